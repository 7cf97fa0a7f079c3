"""Share of facts found, by length and depth, a heat map for each task and model."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.results import Results
from .style import Row, listed, saved

COLUMNS = ("task", "label", "length", "depth", "trials", "accuracy", "trained_length")


def draw_passkey(results: Results, path: Path) -> None:
    """Draw heat maps of length against depth; cells that were not measured are hatched.

    Args:
        results: of the kind passkey, with the columns above.
        path: the file to write; .png or .svg.
    """
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        panels.setdefault((row["task"], row["label"]), []).append(row)
    lengths = sorted({row["length"] for row in results.rows})
    depths = sorted({row["depth"] for row in results.rows})
    width, height = max(1.6, 0.5 * len(lengths)), max(1.0, 0.28 * len(depths))
    across = min(len(panels), max(1, round(6 / width)))
    down = -(-len(panels) // across)
    across_all, down_all = 1.6 + across * (width + 0.2), max(2.5, 0.9 + down * (height + 0.4))
    with saved(path, _title(results), down_all, max(4.0, across_all)) as figure:
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for unused in range(len(panels), grid.size):
            grid.flat[unused].set_visible(False)
            grid.flat[unused - across].tick_params(labelbottom=True)  # the lowest of its column
        one_task = len({task for task, _ in panels}) == 1
        for axes, ((task, label), rows) in zip(grid.flat, panels.items(), strict=False):
            image = _heat_map(axes, rows, lengths, depths)
            name = label if one_task else f"{task}: {label}"
            axes.set_title(textwrap.fill(name, int(12 * width)), parse_math=False)
        known = {row["trained_length"] for row in results.rows} - {None}
        trained = [f"{n:,}" for n in sorted(known) if lengths[0] <= n < lengths[-1]]
        note = f"\nDashed: end of the trained length, {listed(trained)}" if trained else ""
        figure.supxlabel(f"Length, tokens{note}")
        figure.supylabel("Depth of the fact,\n% of the length")
        figure.colorbar(image, ax=grid, label="Facts found, %", pad=0.02)


def _title(results: Results) -> str:
    tasks, labels = (
        listed(dict.fromkeys(row[name] for row in results.rows)) for name in ("task", "label")
    )
    trials = sorted({row["trials"] for row in results.rows})
    count = "-".join(str(n) for n in dict.fromkeys((trials[0], trials[-1])))
    count = "1 trial" if count == "1" else f"{count} trials"
    return f"Task {tasks}: facts found by {labels}, {count} in each cell"


def _heat_map(axes: Any, rows: Sequence[Row], lengths: list[int], depths: list[float]) -> Any:
    cells = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        cells[depths.index(row["depth"]), lengths.index(row["length"])] = 100 * row["accuracy"]
    axes.patch.set(facecolor="0.9", hatch="///", edgecolor="0.7")  # shows where a cell is empty
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
