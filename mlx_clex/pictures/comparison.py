"""Two models on one text, by position."""

import math
from pathlib import Path
from typing import Any

from ..evaluation.results import Results
from .style import LOOKS, Row, legend, log_axis, plain_ticks


def draw_comparison(figure: Any, results: Results) -> None:
    """Divergence, changed choices and both perplexities, by position in the text."""
    figure.set_size_inches(7.2, 6)
    rows = sorted(results.rows, key=lambda row: row["first"])
    names = _names(rows[0])
    edges = [*(row["first"] for row in rows), rows[-1]["last"] + 1]
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    of = f", on {rows[0]['text']}" if rows[0].get("text") else ""
    top.set_title(f"{names[0]} against {names[1]}{of}", parse_math=False)
    for axes, column, factor, name in (
        (top, "kl", 1, "KL divergence,\nnats per token"),
        (middle, "flips", 100, "Other most likely\ntoken, %"),
    ):
        values = [math.nan if row[column] is None else factor * row[column] for row in rows]
        axes.stairs(values, edges, color="black", linewidth=1.6)
        axes.set_ylabel(name)
        if any(value > 0 for value in values):
            log_axis(axes)
    drawn = {}
    columns = ("perplexity_a", "perplexity_b")
    for name, column, (colour, style, _) in zip(names, columns, LOOKS, strict=False):
        values = [math.nan if row[column] is None else row[column] for row in rows]
        # The last value once more, so that the last bucket is drawn as wide as it is.
        (drawn[name],) = bottom.plot(
            edges, [*values, values[-1]], drawstyle="steps-post", color=colour, linestyle=style
        )
    bottom.set_ylabel("Perplexity")
    bottom.set_xlabel("Position in the text, tokens")
    bottom.set_xscale("log", base=2)
    plain_ticks(bottom.xaxis, edges)
    log_axis(bottom)
    legend(bottom, drawn)


def _names(row: Row) -> list[str]:
    """Short names of the two models, which differ."""
    given = [str(row.get(f"model_{which}") or which.upper()) for which in "ab"]
    short = [Path(name).name for name in given]
    return (
        short
        if short[0] != short[1]
        else [f"{name} ({w})" for name, w in zip(short, "AB", strict=True)]
    )
