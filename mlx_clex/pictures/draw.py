"""Draws result files, each kind in its own way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError, say
from ..evaluation.results import Results
from .comparison import draw_comparison
from .passkey import draw_passkeys
from .perplexity import draw_perplexity
from .style import saved


def picture(results: Results) -> None:
    """Draw results beside their files, as PREFIX.png; nothing where they have no files.

    A note on stderr names the files; without matplotlib it says what to install.
    """
    path = results.path(".png")
    if path is None or not results.rows:
        return
    files = f"{results.path('.json')} and {results.path('.csv')}"
    try:
        draw(results, path)
    except InputError as error:
        say(f"Wrote {files}. No picture: {error}")
    else:
        say(f"Wrote {files}, and drew {path}.")


def draw(results: Results, path: Path) -> None:
    """Draw results as their kind is drawn.

    Args:
        results: of the kind perplexity, passkey or compare.
        path: the file to write; .png or .svg.

    Raises:
        InputError: another kind, no rows, columns that are missing, another suffix, or no
            matplotlib.
    """
    if results.kind not in _FIGURES:
        raise InputError(
            f"There is no picture of {results.kind} results, only of {', '.join(_FIGURES)}."
        )
    if not results.rows:
        raise InputError("The results have no rows to draw yet.")
    figure_of, columns = _FIGURES[results.kind]
    missing = {column for row in results.rows for column in columns if column not in row}
    if missing:
        raise InputError(f"The {results.kind} results lack {', '.join(sorted(missing))}.")
    with saved(path) as figure:
        figure_of(figure, results)


# By the kind of results: what draws them, and the columns it reads.
_FIGURES: dict[str, tuple[Callable[[Any, Results], None], tuple[str, ...]]] = {
    "perplexity": (
        draw_perplexity,
        ("label", "length", "perplexity", "low", "high", "trained_length", "reach"),
    ),
    "passkey": (
        draw_passkeys,
        ("task", "label", "length", "depth", "trials", "accuracy", "trained_length"),
    ),
    "compare": (draw_comparison, ("first", "last", "kl", "flips", "perplexity_a", "perplexity_b")),
}
