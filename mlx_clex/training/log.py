"""The log of a run: JSON objects, one a line, in the order of iterations.

    {"iteration": 10, "loss": 5.1, "scale": 3.0, "learning_rate": 1e-05, "tokens": 20480}
    {"iteration": 200, "valid_loss": 5.0, "perplexity": {"4096": 148.4, "8192": 151.2}}

One of the first kind for each iteration; `tokens` is how many have been trained on so far. One
of the second for each validation; `perplexity` is by length in tokens.

Not covered: what is printed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

LOG = "log.jsonl"  # in the adapters' folder


class Log:
    """The log of a run that begins or goes on."""

    def __init__(self, path: Path | None, iteration: int) -> None:
        """Open it, and drop what a killed run wrote past its last save.

        Args:
            path: the file, which need not exist; None writes nothing.
            iteration: that of the save; 0 where there is none.
        """
        self._file: BinaryIO | None = None
        if path is None:
            return
        kept = 0
        for line, end in _lines(path, broken_ends=True):
            if line["iteration"] > iteration or iteration == 0:
                break
            kept = end
        self._file = path.open("ab")
        self._file.truncate(kept)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, at once."""
        if self._file:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All lines of a log; one that was cut off ends it. None where there is no file."""
    return [line for line, _ in _lines(path)]


def _lines(path: Path, *, broken_ends: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line, and the bytes up to its end; a broken one raises ValueError, or ends it."""
    end = 0
    if not path.is_file():
        return
    with path.open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                return
            end += len(text)
            try:
                line = json.loads(text)
            except ValueError:
                if broken_ends:
                    return  # after a power cut
                raise
            yield line, end
