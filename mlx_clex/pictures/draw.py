"""Choose the picture of a result file by the kind of its results.

Not covered: measuring (the commands), and result files (`evaluation/results.py`).
"""

from collections.abc import Callable
from pathlib import Path

from ..errors import InputError, say
from ..evaluation.results import Results
from . import comparison, passkey, perplexity

# Kind of results -> the function that draws them, and the columns that it reads.
PICTURES: dict[str, tuple[Callable[[Results, Path], None], tuple[str, ...]]] = {
    "perplexity": (perplexity.draw_perplexity, perplexity.COLUMNS),
    "passkey": (passkey.draw_passkey, passkey.COLUMNS),
    "compare": (comparison.draw_comparison, comparison.COLUMNS),
}


def picture(results: Results) -> None:
    """Draw results beside their files, as PREFIX.png; draw nothing if they have no files.

    A note on stderr names the files, or says what to install if matplotlib is missing.
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
    """Draw the picture for this kind of results.

    Args:
        results: of the kind perplexity, passkey or compare.
        path: the file to write; .png or .svg.

    Raises:
        InputError: another kind, no rows, missing columns, another suffix, or matplotlib is
            missing.
    """
    if results.kind not in PICTURES:
        raise InputError(
            f"There is no picture of {results.kind} results, only of {', '.join(PICTURES)}."
        )
    if not results.rows:
        raise InputError("The results have no rows to draw yet.")
    draw_kind, columns = PICTURES[results.kind]
    missing = {column for row in results.rows for column in columns if column not in row}
    if missing:
        raise InputError(f"The {results.kind} results lack {', '.join(sorted(missing))}.")
    draw_kind(results, path)
