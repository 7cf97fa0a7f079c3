"""Store results in PREFIX.json and PREFIX.csv, row by row.

A command opens its results, looks up the rows that are already measured, and adds the
others. Each added row is written to disk at once, so an interrupted run can continue.

Not covered: pictures of results (`pictures/`).
"""

import csv
import io
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.files import expand, read_json, write_text
from ..checkpoint.lock import locked
from ..errors import InputError, RunError

_PACKAGES = ("mlx-clex", "mlx", "mlx-lm")
# Columns whose cells are numbers, numbers or null, and texts; others may be any of these.
_NUMBERS = {"length", "depth", "trials", "correct", "accuracy", "windows", "first", "last"}
_MAYBE_NUMBERS = {"perplexity", "low", "high", "reach", "trained_length", "scale", "kl", "flips"}
_MAYBE_NUMBERS |= {"loss", "ratio", "ratio_low", "ratio_high"}
_TEXTS = {"label", "task", "text"}
_SIGNED = {"kl", "loss"}  # near 0 they may round below it
_POSITIVE = {"length", "perplexity", "scale", "trained_length", "reach"}
_NO_NUMBER = {("evaluate", "length")}  # kind and column; a task without lengths has null
_LOSSES = "losses"  # of each window, the only list
_LONGEST, _LARGEST = 10_000, 1e100  # characters of a cell, and size of a number in one
_PARTS = {"kind": str, "settings": dict, "keys": list, "versions": dict, "rows": list}


@dataclass
class Results:
    """Rows of one kind, from `open_results` or `read_results`."""

    kind: str  # what was measured, e.g. "perplexity"
    settings: dict[str, Any]  # everything that affects the figures and is common to all rows
    keys: tuple[str, ...]  # the columns that identify a row
    rows: list[dict[str, Any]] = field(default_factory=list)
    prefix: Path | None = None  # path of the files without suffix; None writes no files

    def find(self, **keys: Any) -> dict[str, Any] | None:
        """Return the first row with these values, or None."""
        return next((row for row in self.rows if _has(row, keys)), None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, or replace the row with the same keys, and write the files.

        Args:
            row: finite numbers, texts, None and lists by column; PREFIX.csv has no lists.

        Raises:
            RunError: a number is NaN or infinite; the message names its column.
        """
        new = dict(row)
        for name, value in new.items():
            if isinstance(value, float) and not math.isfinite(value):
                where = ", ".join(f"{key} {new[key]}" for key in self.keys)
                raise RunError(
                    f"{name} is {value:g} ({where}), so it is not reported: the model gives no "
                    "finite numbers there. Check its weights, or convert it with --dtype float32."
                )
        same = {name: new[name] for name in self.keys}
        for index, old in enumerate(self.rows):
            if _has(old, same):
                self.rows[index] = new
                break
        else:
            self.rows.append(new)
        self.write()

    def check_model(self, label: str, model: str) -> None:
        """Refuse to continue if the rows of this label belong to another model.

        Args:
            label: value of the column "label".
            model: digest of the model, as in the column "model".

        Raises:
            InputError: a row has this label and another digest.
        """
        if any(row.get("label") == label and row.get("model") != model for row in self.rows):
            raise InputError(
                f"{self.path('.json')} has results of another model named {label}. Give another "
                "--output, or delete the file."
            )

    def path(self, suffix: str) -> Path | None:
        """Return PREFIX + suffix, or None if no files are written."""
        return None if self.prefix is None else _path(self.prefix, suffix)

    def write(self) -> None:
        """Replace PREFIX.json and PREFIX.csv."""
        if self.prefix is None:
            return
        whole = {
            "kind": self.kind,
            "settings": self.settings,
            "keys": list(self.keys),
            "versions": {name: version(name) for name in _PACKAGES},
            "rows": self.rows,
        }
        write_text(_path(self.prefix, ".json"), json.dumps(whole, indent=1) + "\n")
        # A list, such as the loss of each window, has no place in a table of numbers.
        columns = list(
            dict.fromkeys(
                name for row in self.rows for name in row if not isinstance(row[name], list)
            )
        )
        text = io.StringIO()
        table = csv.DictWriter(text, columns or list(self.keys), extrasaction="ignore")
        table.writeheader()
        table.writerows(self.rows)
        write_text(_path(self.prefix, ".csv"), text.getvalue())


@contextmanager
def alone(prefix: str | Path | None) -> Iterator[None]:
    """Let one process at a time add rows to the files of a prefix; the others wait.

    Two processes that read the files and then write them would lose each other's rows.

    Raises:
        InputError: the folder of the files cannot be written.
    """
    if prefix is None:
        yield
        return
    path = expand(str(prefix).removesuffix(".json"))
    with locked(_path(path, ".json"), f"--output {prefix}"):
        yield


def open_results(
    prefix: str | Path | None, *, kind: str, settings: Mapping[str, Any], keys: Sequence[str]
) -> Results:
    """Return results to add rows to, with the rows of an earlier run with the same settings.

    Args:
        prefix: path of the files, as the user gave it, with or without ".json". None keeps the
            rows in memory.
        kind: what is measured.
        settings: everything that affects a figure, but not the number of rows.
        keys: the columns that identify a row.

    Raises:
        InputError: the file has results of another kind or other settings, or the files cannot
            be written.
    """
    # JSON turns tuples into lists; settings are compared in that form.
    results = Results(kind, json.loads(json.dumps(dict(settings))), tuple(keys))
    if prefix is None:
        return results
    results.prefix = expand(str(prefix).removesuffix(".json"))
    file, table = (_path(results.prefix, suffix) for suffix in (".json", ".csv"))
    if not file.exists() and table.exists() and not _has_columns(table, keys):
        raise InputError(f"{table} is not a table of mlx_clex. Give another --output.")
    if file.exists():
        there = read_results(file)
        # A file without rows may be overwritten.
        if there.rows:
            _check_same(there, results, file)
            results.rows = there.rows
    try:
        results.prefix.parent.mkdir(parents=True, exist_ok=True)
        results.write()  # fail before the measurement if the folder cannot be written
    except OSError as error:
        raise InputError(
            f"--output {prefix} cannot be written ({error.strerror}). Give another path."
        ) from error
    return results


def read_results(path: str | Path, *kinds: str) -> Results:
    """Read results from a file.

    Args:
        path: PREFIX.json or PREFIX.
        kinds: allowed kinds; any kind if none is given.

    Raises:
        InputError: the file is missing, not a result file, or of another kind.
    """
    prefix = expand(str(path).removesuffix(".json"))
    file = _path(prefix, ".json")
    try:
        file.stat()
        whole_file = _is_result(whole := read_json(file))
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}). Give the --output of an earlier run."
        ) from error
    except (TypeError, ValueError):  # no JSON, a column's name that is a list, half a character
        whole_file = False
    if not whole_file:
        raise InputError(
            f"{file} is not a result file of mlx_clex. Give a file that --output wrote."
        )
    if kinds and whole["kind"] not in kinds:
        raise InputError(
            f"{file} has results of {whole['kind']}. Give results of {' or '.join(kinds)}."
        )
    return Results(whole["kind"], whole["settings"], tuple(whole["keys"]), whole["rows"], prefix)


def _has_columns(table: Path, keys: Sequence[str]) -> bool:
    with table.open(encoding="utf-8", errors="replace") as file:
        return set(keys) <= set(file.readline(_LONGEST).rstrip("\n").split(","))


def _check_same(there: Results, here: Results, file: Path) -> None:
    old = {"kind": there.kind, **there.settings}
    new = {"kind": here.kind, **here.settings}
    differences = [
        f"{name}: {json.dumps(old.get(name))} in the file, {json.dumps(new.get(name))} now"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise InputError(
            f"{file} has results of another run ({'; '.join(differences)}). Give another "
            "--output, or delete the file."
        )


def _is_result(whole: Any) -> bool:
    return (
        isinstance(whole, dict)
        and all(isinstance(whole.get(name), kind) for name, kind in _PARTS.items())
        and all(isinstance(row, dict) for row in whole["rows"])
        and all(key in row for row in whole["rows"] for key in whole["keys"])
        and all(
            _is_cell(name, cell) or (cell is None and (whole["kind"], name) in _NO_NUMBER)
            for row in whole["rows"]
            for name, cell in row.items()
        )
    )


def _is_cell(name: str, cell: Any) -> bool:
    """Return whether a cell can be in a column; tables and pictures compute with it."""
    if name == _LOSSES:
        return isinstance(cell, list) and all(_is_cell("loss", loss) for loss in cell)
    if isinstance(cell, str):
        cell.encode()
        if any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in cell):
            return False  # a terminal would obey it
        return name not in _NUMBERS | _MAYBE_NUMBERS and len(cell) <= _LONGEST
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        low = 0 if name in (_NUMBERS | _MAYBE_NUMBERS) - _SIGNED else -_LARGEST
        whole = name not in _TEXTS and low <= cell <= _LARGEST
        return whole and (cell > 0 or name not in _POSITIVE)
    return name not in _NUMBERS | _TEXTS and (
        cell is None or (isinstance(cell, bool) and name not in _MAYBE_NUMBERS)
    )


def _has(row: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(name in row and row[name] == value for name, value in values.items())


def _path(prefix: Path, suffix: str) -> Path:
    if not prefix.name:
        raise InputError(f"{prefix} names no file. Give a path such as results/books.")
    # with_suffix would replace the ".5" of a prefix such as "factor-0.5".
    return prefix.with_name(prefix.name + suffix)
