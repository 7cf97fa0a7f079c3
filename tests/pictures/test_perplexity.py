"""Perplexity by length."""

from mlx_clex.pictures.draw import draw

from .rows import REACHES, many, perplexities, results


def test_perplexity_by_length(tmp_path, figures, named, legend):
    """Every row is on its line; bands, reach and trained length are marked."""
    draw(results("perplexity"), tmp_path / "a.png")
    (axes,) = figures[0].axes
    rows = perplexities()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    lines = named(axes)
    assert {label: lines[label] for label in REACHES} == {
        label: [[r["length"], r["perplexity"]] for r in rows if r["label"] == label]
        for label in REACHES
    }
    assert [t.get_text() for t in axes.get_xticklabels()] == ["128", "256", "512", "1,024", "2,048"]
    bands = [part.get_paths()[0].vertices[:, 1] for part in axes.collections]
    assert all(band.min() == 4.5 and band.max() == 5.5 + 32 for band in bands)
    assert len(bands) == len(REACHES)
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    past = [list(line.get_xdata()) for line in hollow if len(line.get_xdata())]
    assert past == [[256, 512, 1024, 2048], [1024, 2048]]
    assert legend(axes) == [
        *("base", "base + ntk 4", "clex", "a $name$ of_theirs"),
        *("hollow: beyond its reach", "95 % interval"),
        *("trained length 128", "reach 128, 512 and 2,048"),
    ]
    assert axes.get_ylabel() == ("Perplexity, whole windows\n1,024 to 16,384 tokens scored at each")


def test_the_title_names_the_text_and_the_models(tmp_path, figures):
    """The title of a picture of many models gives their number."""
    draw(results("perplexity"), tmp_path / "a.png")
    draw(results("perplexity", many()), tmp_path / "b.png")
    titles = [figure.get_suptitle() for figure in figures]
    names = "base, base + ntk 4, clex and a $name$ of_theirs"
    assert titles == [f"A $text$: perplexity of {names}", "A $text$: perplexity of 9 models"]


def test_what_is_no_number_is_left_out(tmp_path, figures, named):
    """A perplexity beyond all floats is kept as None."""
    rows = perplexities()
    rows[1] |= {"perplexity": None}
    rows[2] |= {"low": None}
    draw(results("perplexity", rows), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert [x for x, _ in named(axes)["base"]] == [128, 512, 1024, 2048]
    assert set(axes.collections[0].get_paths()[0].vertices[:, 0]) == {128, 1024, 2048}


def test_intervals_of_few_windows_are_not_drawn(tmp_path, figures, legend):
    """Two windows gave 1.8e-12 to 2e19, which result files of older versions still hold."""
    rows = [{**row, "windows": 4} for row in perplexities()]
    draw(results("perplexity", rows), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert not axes.collections
    assert "95 % interval" not in legend(axes)
