"""Two models by position."""

import pytest

from mlx_clex.pictures.draw import draw

from .rows import differences, results


def test_two_models_by_position(tmp_path, figures, legend):
    """Each bucket from its first token to its last, on a logarithmic axis."""
    draw(results("compare"), tmp_path / "a.png")
    top, middle, bottom = figures[0].axes
    assert figures[0].get_suptitle() == "A text: comparison of two $x$ with one"
    for axes, levels in ((top, [0.1, 0.2, 0.3]), (middle, [0, 2.5, 5])):
        (line,) = axes.lines
        assert list(line.get_xdata()) == [1, 16, 32, 64]
        assert list(line.get_ydata()) == pytest.approx([*levels, levels[-1]])
        assert line.get_drawstyle() == "steps-post"
    assert [list(line.get_ydata()) for line in bottom.lines] == [[5, 6, 7, 7], [6, 7, 8, 8]]
    assert legend(bottom) == ["two $x$", "one"]
    assert [axes.get_xscale() for axes in figures[0].axes] == ["log"] * 3
    assert [axes.get_yscale() for axes in figures[0].axes] == ["log", "linear", "log"]


def test_models_that_do_not_differ(tmp_path, figures):
    """A divergence of 0 has no place on a logarithmic axis."""
    rows = [{**row, "kl": 0.0} for row in differences()]
    draw(results("compare", rows), tmp_path / "a.png")
    top = figures[0].axes[0]
    assert top.get_yscale() == "linear"
    assert top.get_ylim()[0] == 0
    assert list(top.lines[0].get_ydata()) == [0] * 4
