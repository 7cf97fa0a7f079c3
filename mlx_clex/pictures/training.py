"""The loss of a run, and its perplexity by length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .style import LOOKS, Points, Row, columns, finite, legend, lines, log_axis, saved


def draw_training(log: Sequence[Row], path: Path) -> None:
    """Draw the loss of a run, and below it the perplexity by length where it was measured.

    Args:
        log: lines of a training log, as `training.log` describes them.
        path: the file to write; .png or .svg.

    Raises:
        InputError: there is nothing to draw, another suffix, or no matplotlib.
    """
    if not any(line.keys() & {"loss", "valid_loss"} for line in log):
        raise InputError("The log has no losses to draw yet.")
    by_length = _perplexity_by_length(log)
    with saved(path) as figure:
        figure.set_size_inches(7.2, 6 if by_length else 3.4)
        panels = figure.subplots(2 if by_length else 1, 1, sharex=True, squeeze=False)[:, 0]
        _losses(panels[0], log)
        if by_length:
            drawn = lines(panels[1], by_length)
            panels[1].set_ylabel("Perplexity")
            panels[1].set_title("Validation, by length")
            log_axis(panels[1])
            legend(panels[1], drawn)
        panels[-1].set_xlabel("Iteration")


def _losses(axes: Any, log: Sequence[Row]) -> None:
    """Loss of every iteration, its running mean, and that of validation."""
    steps = finite((line["iteration"], line.get("loss")) for line in log)
    window = max(1, len(steps) // 50)
    if window > 1:
        axes.plot(*columns(steps), color="0.75", linewidth=0.8)
        means = np.convolve(columns(steps)[1], np.ones(window) / window, "valid")
        middle = steps[(window - 1) // 2 :]
        steps = [(step, mean) for (step, _), mean in zip(middle, means, strict=False)]
    valid = finite((line["iteration"], line.get("valid_loss")) for line in log)
    drawn = {}
    if steps:
        (drawn["training"],) = axes.plot(*columns(steps), color=LOOKS[0][0])
    if valid:
        colour, style, marker = LOOKS[1]
        (drawn["validation"],) = axes.plot(
            *columns(valid), color=colour, linestyle=style, marker=marker
        )
    mean = f", mean of {window} iterations" if window > 1 else ""
    axes.set_title(f"Loss{mean}")
    axes.set_ylabel("Nats per token")
    legend(axes, drawn)


def _perplexity_by_length(log: Sequence[Row]) -> dict[str, Points]:
    found: dict[str, list[tuple[float, Any]]] = {}
    for line in log:
        for length, value in (line.get("perplexity") or {}).items():
            found.setdefault(f"{int(length):,} tokens", []).append((line["iteration"], value))
    return {name: finite(points) for name, points in found.items()}
