"""Heat maps of facts found, by length and depth."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.results import Results
from .style import Row


def draw_passkeys(figure: Any, results: Results) -> None:
    """Heat maps of length against depth, one a task and label."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        panels.setdefault((row["task"], row["label"]), []).append(row)
    lengths = sorted({row["length"] for row in results.rows})
    depths = sorted({row["depth"] for row in results.rows})
    width, height = max(1.6, 0.5 * len(lengths)), max(1.0, 0.28 * len(depths))
    across = min(len(panels), max(1, round(6 / width)))
    down = -(-len(panels) // across)
    figure.set_size_inches(1.6 + across * (width + 0.2), max(2.5, 0.6 + down * (height + 0.4)))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((task, label), rows) in zip(grid.flat, panels.items(), strict=False):
        image = _heat_map(axes, rows, lengths, depths)
        axes.set_title(f"{task}: {label}", parse_math=False)
    known = {row["trained_length"] for row in results.rows} - {None}
    trained = sorted(n for n in known if lengths[0] <= n < lengths[-1])
    note = f" (dashed: trained at {' and '.join(f'{n:,}' for n in trained)})" if trained else ""
    figure.supxlabel(f"Length, tokens{note}", fontsize=10)
    figure.supylabel("Depth, % of the length", fontsize=10)
    trials = sorted({row["trials"] for row in results.rows})
    count = "-".join(str(n) for n in dict.fromkeys((trials[0], trials[-1])))
    of = "1 trial" if count == "1" else f"{count} trials"
    figure.colorbar(image, ax=grid, label=f"Right answers, % of {of}", pad=0.02)


def _heat_map(axes: Any, rows: Sequence[Row], lengths: list[int], depths: list[float]) -> Any:
    cells = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        cells[depths.index(row["depth"]), lengths.index(row["length"])] = 100 * row["accuracy"]
    axes.patch.set(facecolor="0.9", hatch="///", edgecolor="0.7")  # where nothing was measured
    image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (line, column), value in np.ndenumerate(cells):
        if not math.isnan(value):
            colour = "white" if value > 55 else "black"
            axes.text(column, line, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    trained = rows[0]["trained_length"] or 0
    inside = sum(length <= trained for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside - 0.5, color="white", linewidth=2.5)
        axes.axvline(inside - 0.5, color="black", linestyle="--")
    return image
