"""Two models on one text: divergence, first choices and perplexity, by position."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.results import Results
from .style import add_legend, log_axis, look, saved, set_ticks, title_of

COLUMNS = (
    *("first", "last", "kl", "flips"),
    *("model_a", "perplexity_a", "model_b", "perplexity_b"),
)


def draw_comparison(results: Results, path: Path) -> None:
    """Draw three panels over one logarithmic axis of positions.

    Args:
        results: of the kind compare, with the columns above.
        path: the file to write; .png or .svg.
    """
    rows = sorted(results.rows, key=lambda row: row["first"])
    edges = [*(row["first"] for row in rows), rows[-1]["last"] + 1]
    # Result files of older versions have no labels, only the paths.
    a, b = (str(rows[0].get(f"label_{x}") or rows[0][f"model_{x}"]) for x in "ab")
    with saved(path, title_of(rows, f"comparison of {b} with {a}"), height=6) as figure:
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        kl = [row["kl"] for row in rows]
        _steps(top, edges, kl, 0)
        top.set_ylabel("KL divergence,\nnats per token")
        if all(value is not None and value > 0 for value in kl):
            log_axis(top)
        else:
            top.set_ylim(bottom=min(0, *(value or 0 for value in kl)))
        _steps(middle, edges, [None if r["flips"] is None else 100 * r["flips"] for r in rows], 0)
        middle.set_ylabel("Different first choice,\n% of tokens")
        middle.set_ylim(bottom=0)
        lines = [
            _steps(bottom, edges, [row[f"perplexity_{x}"] for row in rows], index, name)
            for index, (x, name) in enumerate((("a", a), ("b", b)))
        ]
        bottom.set_ylabel("Perplexity")
        log_axis(bottom)
        add_legend(bottom, lines, above=True)
        bottom.set_xscale("log", base=2)
        bottom.set_xlim(edges[0], edges[-1])
        # The last position is often next to the beginning of the last bucket.
        set_ticks(bottom.xaxis, edges if edges[-1] > 1.5 * edges[-2] else edges[:-1])
        bottom.set_xlabel("Position in the text, tokens")


def _steps(
    axes: Any, edges: Sequence[int], values: Sequence[float | None], index: int, name: str = ""
) -> Any:
    """Draw a horizontal line for each bucket of positions; return the line."""
    levels = [math.nan if value is None else value for value in values]
    style = look(index, marker=False)
    # steps-post draws no level after the last point, so the last level is given twice.
    (line,) = axes.plot(edges, [*levels, levels[-1]], drawstyle="steps-post", label=name, **style)
    return line
