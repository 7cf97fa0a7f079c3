"""Loss of a training run, and its perplexity by length, by iteration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .style import Points, Row, add_legend, columns, draw_lines, finite, log_axis, look, saved

_WINDOWS = 20  # of the running mean, in a run


def draw_training(log: Sequence[Row], path: Path, title: str = "Training run") -> None:
    """Draw the loss of a run, and below it the perplexity by length where it was measured.

    Args:
        log: lines of a training log, as `training.log` describes them.
        path: the file to write; .png or .svg.
        title: the text and the model.

    Raises:
        InputError: there is nothing to draw, another suffix, or matplotlib is missing.
    """
    if not any(line.keys() & {"loss", "valid_loss"} for line in log):
        raise InputError("The log has no losses to draw yet.")
    by_length = _perplexity_by_length(log)
    with saved(path, title, height=6 if by_length else 3.4) as figure:
        panels = figure.subplots(2 if by_length else 1, 1, sharex=True, squeeze=False)[:, 0]
        _losses(panels[0], log)
        if by_length:
            lines = draw_lines(panels[1], by_length)
            panels[1].set_ylabel("Perplexity of\nthe validation data")
            log_axis(panels[1])
            add_legend(panels[1], lines)
        panels[-1].set_xlabel("Iteration")


def _losses(axes: Any, log: Sequence[Row]) -> None:
    """Draw the loss of every iteration, its running mean, and the loss of validation."""
    steps = finite((line["iteration"], line.get("loss")) for line in log)
    valid = finite((line["iteration"], line.get("valid_loss")) for line in log)
    window = max(1, len(steps) // _WINDOWS)
    lines, name = [], "training"
    if window > 1:
        axes.plot(*columns(steps), color="0.75", linewidth=0.8)
        means = np.convolve(columns(steps)[1], np.ones(window) / window, "valid")
        middle = steps[(window - 1) // 2 :]
        steps = [(step, mean) for (step, _), mean in zip(middle, means, strict=False)]
        name = f"training, mean of {window} iterations"
    if steps:
        lines += axes.plot(*columns(steps), label=name, **look(0, marker=False))
    if valid:
        lines += axes.plot(*columns(valid), label="validation", **look(1))
    axes.set_ylabel("Loss,\nnats per token")
    add_legend(axes, lines)


def _perplexity_by_length(log: Sequence[Row]) -> dict[str, Points]:
    found: dict[str, list[tuple[float, Any]]] = {}
    for line in log:
        for length, value in (line.get("perplexity") or {}).items():
            found.setdefault(f"{int(length):,} tokens", []).append((line["iteration"], value))
    return {name: finite(points) for name, points in found.items()}
