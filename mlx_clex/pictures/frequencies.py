"""What a scaling has learned: the frequency of every pair at every scale."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..scaling import Scaling
from ..scaling.ntk import Ntk
from .style import LOOKS, lines, log_axis, plain_ticks, saved

_NTK = "NTK at t"


def draw_frequencies(scalings: Mapping[str, Scaling], path: Path, max_scale: float = 0) -> None:
    """Draw how fast every pair turns at every scale, a row of panels a model.

    Left, the inverse frequency of every pair along the scale; right, at the largest scale, its
    ratio to that of NTK-aware scaling. Beside what the model has learned, what it started from.

    Args:
        scalings: by the names to show.
        path: the file to write; .png or .svg.
        max_scale: the largest scale, target length / trained length; 0 takes each model's
            reach, or 16 where it has none.

    Raises:
        InputError: a scale out of range, another suffix, or no matplotlib.
    """
    largest = {name: max_scale or _largest_scale(scaling) for name, scaling in scalings.items()}
    for name, scaling in scalings.items():
        if scaling.hard_reach:
            scaling.check_scale(largest[name])
    with saved(path) as figure:
        figure.set_size_inches(8, 3.4 * len(scalings))
        grid = figure.subplots(len(scalings), 2, squeeze=False, width_ratios=(10, 9))
        for (left, right), (name, scaling) in zip(grid, scalings.items(), strict=True):
            _every_pair(left, name, scaling, largest[name])
            _ratio_to_ntk(right, scaling, largest[name])


def _largest_scale(scaling: Scaling) -> float:
    reach = scaling.reach or 0
    return reach / scaling.trained_length if reach > scaling.trained_length else 16.0


def _frequencies(scaling: Scaling, scale: float) -> np.ndarray:
    """Radians per token, (D/2,); where layers and heads have their own, the median."""
    layers = range((scaling.shape.layers or 1) if scaling.by_layer else 1)
    found = np.stack([np.array(scaling.inv_freq(scale, layer)) for layer in layers])
    return np.median(found.reshape(-1, found.shape[-1]), axis=0)


def _compared(scaling: Scaling) -> dict[str, Scaling]:
    """The scaling, what its training began with, and NTK-aware scaling, by their names."""
    shape = vars(scaling.shape)
    name = scaling.name
    ntk = {_NTK: Ntk(**shape)}
    if not scaling.learned:
        return {name: scaling} | ntk
    fresh = type(scaling)(scaling.config, **shape)
    return {f"{name}, learned": scaling, f"untrained: {scaling.untrained}": fresh} | ntk


def _every_pair(axes: Any, name: str, scaling: Scaling, largest: float) -> None:
    scales = np.geomspace(1, largest, 65)
    for what, (colour, style, _) in zip(_compared(scaling).values(), LOOKS[:2], strict=False):
        table = np.stack([_frequencies(what, float(scale)) for scale in scales])
        axes.plot(scales, table, color=colour, linestyle=style, linewidth=0.8)
    heads = ", median of all heads" if scaling.by_layer else ""
    axes.set_title(name + heads, parse_math=False)
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, [2.0**n for n in range(int(math.log2(largest)) + 1)])
    axes.set_xlabel("Scale t, target length / trained length")
    axes.set_yscale("log")
    axes.set_ylabel("Inverse frequency, radians per token")


def _ratio_to_ntk(axes: Any, scaling: Scaling, largest: float) -> None:
    """Inverse frequency of every pair over that of NTK-aware scaling, at the largest scale."""
    compared = _compared(scaling)
    ntk = _frequencies(compared.pop(_NTK), largest)
    points = {
        name: list(enumerate((_frequencies(what, largest) / ntk).tolist(), 1))
        for name, what in compared.items()
    }
    drawn = lines(axes, points)
    for line in drawn.values():
        line.set_markevery(max(1, len(ntk) // 16))
    axes.axhline(1, color="0.4", linewidth=1, linestyle=":")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("Pair of dimensions, from the fastest")
    axes.set_ylabel(f"Inverse frequency / that of {_NTK}, t = {largest:g}")
    log_axis(axes)
    for text in axes.legend(loc="best").get_texts():
        text.set_parse_math(False)
