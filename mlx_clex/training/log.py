"""The log of a run: one JSON object a line, in the order of iterations.

    {"iteration": 10, "loss": 5.1, "scale": 3.0, "learning_rate": 1e-05, "tokens": 20480}
    {"iteration": 200, "valid_loss": 5.0, "perplexity": {"4096": 148.4, "8192": 151.2}}

Each iteration has a line of the first kind; `tokens` counts those trained on so far. Each
validation has one of the second kind; the keys of `perplexity` are lengths in tokens.

Not covered: what is printed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError

LOG = "log.jsonl"  # in the adapters' folder


class Log:
    """The log of a run, open for writing."""

    def __init__(self, path: Path | None, iteration: int) -> None:
        """Open the log, and delete the lines that a killed run wrote after its last save.

        Args:
            path: the file, which need not exist; None: nothing is written.
            iteration: the iteration of that save; 0: there is none.
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
        """Append a line and flush it."""
        if self._file:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return all whole lines of a log; an empty list where there is no file.

    Raises:
        InputError: a line is not JSON.
    """
    return [line for line, _ in _lines(path)]


def _lines(path: Path, *, broken_ends: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each whole line and the bytes up to its end; a broken line raises, or ends the log."""
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
            except (ValueError, RecursionError) as error:
                if broken_ends:
                    return  # after a power cut
                raise InputError(
                    f"{path} is no log of mlx_clex lora: give the {LOG} of a run."
                ) from error
            yield line, end
