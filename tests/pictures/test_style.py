"""Lines differ without colour, and legends are in the order of the lines."""

from matplotlib.figure import Figure

from mlx_clex.pictures.style import add_legend, draw_lines, look, title_of


def test_no_two_lines_look_alike():
    """The eighth model had the colour, dashes and marker of the first."""
    assert len({str(look(index)) for index in range(49)}) == 49
    without_colour = [{**look(index), "color": None} for index in range(7)]
    assert len({str(each) for each in without_colour}) == 7


def test_the_legend_is_in_the_order_of_the_right_ends(legend):
    """A legend in another order makes the reader search; a line without points has no end."""
    axes = Figure().subplots()
    ends = {"_low": [(1, 9), (2, 1)], "$high$": [(1, 1), (2, 5)], "mid": [(1, 3)], "none": []}
    add_legend(axes, draw_lines(axes, ends))
    assert legend(axes) == ["$high$", "mid", "_low"]


def test_titles_name_the_text():
    """Result files of older versions do not name it."""
    assert title_of([{"text": "A"}, {"text": "A"}, {"text": "B"}], "loss") == "A and B: loss"
    assert title_of([{}], "perplexity of My-Model") == "Perplexity of My-Model"
