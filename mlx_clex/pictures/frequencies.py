"""Frequencies of scalings as a ratio to NTK-aware scaling, by pair of dimensions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..scaling import SCALINGS, Scaling
from .style import add_legend, draw_lines, listed, log_axis, saved

_SCALES = 4  # drawn: the largest, its half, its quarter, ...
_MARKERS = 16  # on a line, at most
_USUAL_SCALE = 16.0  # the largest scale drawn for a scaling without a reach


def draw_frequencies(
    scalings: Mapping[str, Scaling], path: Path, max_scale: float | None = None
) -> None:
    """Draw the frequency of each pair / its frequency under NTK-aware scaling, by scale.

    Both are at the same scale. For a learned scaling, grey lines show the same ratio at
    the start of its training.

    Args:
        scalings: by the names to show.
        path: the file to write; .png or .svg.
        max_scale: the largest scale, target length / trained length. None takes each
            scaling's own largest one, or 16 if it has none.

    Raises:
        InputError: a scale out of range, another suffix, or matplotlib is missing.
    """
    largest = {}
    for name, scaling in scalings.items():
        its_own = scaling.largest_scale
        largest[name] = max_scale or (its_own if its_own > 1 else _USUAL_SCALE)
        if scaling.hard_reach:
            scaling.check_scale(largest[name])
    title = f"Frequencies of {listed(scalings)} against NTK-aware scaling, by scale t"
    with saved(path, title, height=0.5 + 2.9 * len(scalings)) as figure:
        panels = figure.subplots(len(scalings), 1, squeeze=False)[:, 0]
        for axes, (name, scaling) in zip(panels, scalings.items(), strict=True):
            _ratios(axes, name, scaling, largest[name])


def _ratios(axes: Any, name: str, scaling: Scaling, largest: float) -> None:
    halved = [largest / 2**n for n in range(_SCALES)]
    scales = sorted(scale for scale in halved if scale > 1)
    ntk = SCALINGS["ntk"](**vars(scaling.shape))
    pairs = scaling.dims // 2

    def ratios(of: Scaling) -> dict[str, list[tuple[float, float]]]:
        found = {scale: _frequencies(of, scale) / _frequencies(ntk, scale) for scale in scales}
        return {f"t = {scale:.4g}": list(enumerate(its, 1)) for scale, its in found.items()}

    marks = [axes.axhline(1, color="0.4", linewidth=1, linestyle="--", label="NTK-aware scaling")]
    if scaling.learned:
        untrained = type(scaling)(scaling.config, **vars(scaling.shape))
        for points in ratios(untrained).values():
            marks += axes.plot(
                *zip(*points, strict=True),
                color="0.65",
                linewidth=1,
                label=f"untrained: {scaling.untrained}",
            )
    lines = draw_lines(axes, ratios(scaling))
    for line in lines:
        line.set_markevery(-(-pairs // _MARKERS))
    heads = ", median of all heads" if scaling.by_layer else ""
    method = "" if scaling.name in name else f": {scaling.name}"
    axes.set_title(f"{name}{method}{heads}", parse_math=False)
    axes.set_xlabel("Pair of dimensions, from the fastest to the slowest")
    axes.set_xlim(0.5, pairs + 0.5)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("Frequency /\nNTK-aware frequency")
    log_axis(axes)
    add_legend(axes, lines, marks[:2])


def _frequencies(scaling: Scaling, scale: float) -> np.ndarray:
    """Return radians per token, (D/2,); the median if layers and heads have their own."""
    layers = range((scaling.shape.layers or 1) if scaling.by_layer else 1)
    found = np.stack([np.array(scaling.inv_freq(scale, layer)) for layer in layers])
    return np.median(found.reshape(-1, found.shape[-1]), axis=0)
