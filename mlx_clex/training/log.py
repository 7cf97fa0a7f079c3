"""The log of a run: one JSON object a line, in the order of iterations.

    {"iteration": 10, "loss": 5.1, "scale": 3.0, "learning_rate": 1e-05, "tokens": 20480}
    {"iteration": 200, "valid_loss": 5.0, "perplexity": {"4096": 148.4, "8192": 151.2}}

Each iteration has a line of the first kind; `tokens` counts those trained on so far. Each
validation has one of the second kind; the keys of `perplexity` are lengths in tokens.

Not covered: what is printed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..checkpoint.files import check_link, open_regular
from ..errors import InputError

LOG = "log.jsonl"  # in the adapters' folder
_LAST = 1 << 53  # bound of whole numbers in a log


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
        InputError: a line is not of a log, or the file is a link that leads out of its folder.
    """
    return [line for line, _ in _lines(path)]


def _lines(path: Path, *, broken_ends: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each whole line and the bytes up to its end; a broken line raises, or ends the log."""
    end = 0
    if not os.path.lexists(path):
        return
    check_link(path, path.parent)
    with open_regular(path) as file:
        for text in file:
            if not text.endswith(b"\n"):
                return
            end += len(text)
            try:
                line = json.loads(text)
                if not _is_line(line):
                    raise ValueError("no line of a log")
            except (ValueError, RecursionError) as error:
                if broken_ends:
                    return  # after a power cut
                raise InputError(
                    f"{path} is no log of mlx_clex lora: give the {LOG} of a run."
                ) from error
            yield line, end


def _is_line(line: Any) -> bool:
    """Whether a line has the keys and types that are drawn."""
    if not isinstance(line, dict) or type(line.get("iteration")) is not int:
        return False
    by_length = line.get("perplexity") or {}
    if not isinstance(by_length, dict) or not all(key.isdecimal() for key in by_length):
        return False
    drawn = [line.get("loss"), line.get("valid_loss"), *by_length.values()]
    return 0 <= line["iteration"] < _LAST and all(
        value is None or type(value) is float or (type(value) is int and abs(value) < _LAST)
        for value in drawn
    )
