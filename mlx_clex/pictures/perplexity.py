"""Perplexity against length."""

from collections.abc import Iterable
from typing import Any

from ..evaluation.results import Results
from .style import Row, columns, legend, lines, log_axis, plain_ticks


def draw_perplexity(figure: Any, results: Results) -> None:
    """Perplexity against length, a line a label; hollow markers are past its reach."""
    figure.set_size_inches(7.2, 4.3)
    axes = figure.subplots()
    by_label: dict[str, list[Row]] = {}
    for row in sorted(results.rows, key=lambda row: row["length"]):
        mine = by_label.setdefault(row["label"], [])
        if row["perplexity"] is not None:
            mine.append(row)
    points = {
        label: [(row["length"], row["perplexity"]) for row in rows]
        for label, rows in by_label.items()
    }
    drawn = lines(axes, points)
    for label, line in drawn.items():
        rows = by_label[label]
        hollow = [
            (row["length"], row["perplexity"])
            for row in rows
            if row["reach"] is not None and row["length"] > row["reach"]
        ]
        axes.plot(
            *columns(hollow),
            linestyle="none",
            marker=line.get_marker(),
            color=line.get_color(),
            markerfacecolor="white",
        )
        band = [(row["length"], row["low"], row["high"]) for row in rows]
        band = [part for part in band if None not in part]
        if band:
            axes.fill_between(*columns(band), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    lengths = sorted({row["length"] for row in results.rows})
    plain_ticks(axes.xaxis, lengths)
    marks, note = [], ""
    if any(None not in (row["low"], row["high"]) for row in results.rows):
        marks.append("Bands: 95 % intervals.")
    if any(row["reach"] is not None and row["length"] > row["reach"] for row in results.rows):
        marks.append("Hollow: beyond the reach.")
    if any(row.get("inference_time") for row in results.rows):
        note = "MODEL + SCALING: inference-time scaling only"
    axes.set_xlabel("\n".join(filter(None, ["Length, tokens", " ".join(marks), note])))
    axes.set_ylabel(f"Perplexity, protocol {results.settings.get('protocol', 'whole')}")
    texts = dict.fromkeys(row["text"] for row in results.rows if row.get("text"))
    of = f" of {' and '.join(texts)}" if texts else ""
    # Above the names of the vertical lines.
    axes.set_title(f"Perplexity{of}, by length", parse_math=False, pad=30)
    log_axis(axes)
    _mark_lengths(axes, results.rows)
    legend(axes, drawn)


def _mark_lengths(axes: Any, rows: Iterable[Row]) -> None:
    """Vertical lines at trained length and reach, with their names above the axes."""
    low, high = axes.get_xlim()
    reaches = {row["reach"]: ("reach", ":") for row in rows if row["reach"] is not None}
    trained = {row["trained_length"]: ("trained", "--") for row in rows}
    for where, (name, style) in (reaches | trained).items():
        if where is None or not low <= where <= high:
            continue
        axes.axvline(where, color="0.4", linewidth=1, linestyle=style, zorder=1)
        axes.annotate(
            f"{name}\n{where:,}",
            (where, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color="0.25",
        )
