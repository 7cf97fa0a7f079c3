"""Frequencies as a ratio to NTK-aware scaling."""

import numpy as np
import pytest

from mlx_clex.errors import InputError
from mlx_clex.pictures.frequencies import draw_frequencies
from mlx_clex.scaling import SCALINGS

from .rows import scaling

SCALES = (1.0, 2.0, 4.0, 8.0)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_of_every_method(tmp_path, figures, named, legend, name):
    """The ratio of each pair at each scale; in grey the same before training."""
    what = scaling(name)
    draw_frequencies({"mine": what}, tmp_path / "a.png", max_scale=8)
    (axes,) = figures[0].axes
    i = np.arange(0, 16, 2)
    base = 10_000.0 ** -(i / 16)
    lines = named(axes)
    for t in SCALES[1:]:
        heads = [np.array(what.inv_freq(t, layer)).reshape(-1, 8) for layer in (0, 1)]
        mine = np.median(np.concatenate(heads), axis=0)
        ntk = base * t ** -(i / 14)
        pairs, ratios = zip(*lines[f"t = {t:g}"], strict=True)
        assert pairs == tuple(range(1, 9))
        assert np.allclose(ratios, mine / ntk, rtol=1e-5)
    assert "t = 1" not in lines
    assert axes.get_ylabel() == "Frequency /\nNTK-aware frequency"
    grey = [line.get_ydata() for line in axes.lines if line.get_color() == "0.65"]
    if name == "clex":
        # Untrained, CLEX is NTK-aware scaling by 2t - 1.
        expected = [((2 * t - 1) / t) ** -(i / 14) for t in SCALES[1:]]
        assert np.allclose(grey, expected, rtol=1e-5)
        assert "untrained: NTK at 2t - 1" in legend(axes)
    assert len(grey) == (3 if what.learned else 0)


def test_ntk_is_one(tmp_path, figures, named):
    """NTK-aware scaling is what the others are divided by."""
    draw_frequencies({"mine": scaling("ntk")}, tmp_path / "a.png")
    lines = named(figures[0].axes[0])
    lines.pop("NTK-aware scaling")
    assert np.allclose([y for points in lines.values() for _, y in points], 1)


def test_a_scale_beyond_the_reach(tmp_path):
    """CLEX has no frequencies there."""
    with pytest.raises(InputError, match=r"within 1\.\.16"):
        draw_frequencies({"mine": scaling("clex")}, tmp_path / "a.png", max_scale=17)
