"""Perplexity against length, a line for each model.

Not covered: models that were measured on different texts (`plot` refuses them).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..evaluation.intervals import FEWEST_WINDOWS
from ..evaluation.results import Results
from .style import (
    Row,
    add_legend,
    columns,
    draw_lines,
    listed,
    log_axis,
    saved,
    set_ticks,
    title_of,
)

COLUMNS = ("label", "length", "perplexity", "low", "high", "trained_length", "reach")

_READ = {
    "same-targets": "the same targets at every length",
    "whole": "whole windows",
    "chunked": "windows fed in chunks",
    "sliding": "overlapping windows",
}
_MOST_NAMES = 5  # models that the title names; of more it says how many


def draw_perplexity(results: Results, path: Path) -> None:
    """Draw a line for each label, with a band where its 95 % interval is known.

    Hollow markers are beyond the model's reach. Vertical lines are at trained lengths and
    reaches.

    Args:
        results: of the kind perplexity, with the columns above.
        path: the file to write; .png or .svg.
    """
    rows = sorted(results.rows, key=lambda row: row["length"])
    # In the order of the file, not of the lengths.
    labels = list(dict.fromkeys(row["label"] for row in results.rows))
    names = listed(labels) if len(labels) <= _MOST_NAMES else f"{len(labels)} models"
    measured = [row for row in rows if row["perplexity"] is not None]
    with saved(path, title_of(results.rows, f"perplexity of {names}"), height=4.2) as figure:
        axes = figure.subplots()
        points = {
            label: [(r["length"], r["perplexity"]) for r in measured if r["label"] == label]
            for label in labels
        }
        lines = draw_lines(axes, points)
        marks = []
        for line in lines:
            mine = [row for row in measured if row["label"] == line.get_label()]
            marks += [*_hollow(axes, line, mine), *_band(axes, line, mine)]
        axes.set_xscale("log", base=2)
        set_ticks(axes.xaxis, sorted({row["length"] for row in rows}))
        axes.set_xlabel("Length, tokens")
        if any(row.get("inference_time") for row in rows):
            note = "MODEL + SCALING: not fine-tuned, scaled at inference only"
            axes.set_xlabel(f"Length, tokens\n{note}")
        protocol = results.settings.get("protocol", "whole")
        axes.set_ylabel(f"Perplexity, {_READ.get(protocol, protocol)}{_scored(rows)}")
        log_axis(axes)
        marks += _vertical_lines(axes, rows)
        # One entry for each kind of mark.
        add_legend(axes, lines, list({mark.get_label(): mark for mark in marks}.values()))


def _scored(rows: Iterable[Row]) -> str:
    """Return how many tokens each point has, as a second line of the label."""
    numbers = sorted({row["tokens"] for row in rows if row.get("tokens")})
    if not numbers:
        return ""
    upto = f" to {numbers[-1]:,}" if numbers[1:] else ""
    return f"\n{numbers[0]:,}{upto} tokens scored at each"


def _hollow(axes: Any, line: Any, rows: Iterable[Row]) -> list[Any]:
    """Draw the markers of a line beyond its reach hollow; return a handle for the legend."""
    beyond = [row for row in rows if row["reach"] is not None and row["length"] > row["reach"]]
    if not beyond:
        return []
    shape: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white"}
    axes.plot(
        *columns([(row["length"], row["perplexity"]) for row in beyond]),
        marker=line.get_marker(),
        color=line.get_color(),
        **shape,
    )
    return axes.plot([], [], marker="o", color="0.3", label="hollow: beyond its reach", **shape)


def _band(axes: Any, line: Any, rows: Iterable[Row]) -> list[Any]:
    """Draw the 95 % intervals of a line; return a handle for the legend."""
    from matplotlib.patches import Patch

    # Result files of older versions have intervals from as few as two windows.
    known = [
        (row["length"], row["low"], row["high"])
        for row in rows
        if None not in (row["low"], row["high"]) and row.get("windows", 0) >= FEWEST_WINDOWS
    ]
    if len(known) < 2:
        return []
    axes.fill_between(*columns(known), color=line.get_color(), alpha=0.15, linewidth=0)
    return [Patch(color="0.85", label="95 % interval")]


def _vertical_lines(axes: Any, rows: Iterable[Row]) -> list[Any]:
    """Draw a line at each trained length and reach; return handles for the legend."""
    low, high = axes.get_xlim()
    handles = []
    for column, name, style in (
        ("trained_length", "trained length", "--"),
        ("reach", "reach", ":"),
    ):
        values = sorted({row[column] for row in rows if row[column] is not None})
        values = [value for value in values if low <= value <= high]
        label = f"{name} {listed(f'{value:,}' for value in values)}" if values else ""
        for value in values:
            line = axes.axvline(
                value, color="0.4", linewidth=1, linestyle=style, zorder=1, label=label
            )
        handles += [line] if values else []
    return handles
