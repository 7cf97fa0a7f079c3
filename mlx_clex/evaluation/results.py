"""Result files: figures on disk, row by row.

A command opens its results, asks which rows are there already, and adds the others one by
one. Every added row is on disk at once, as PREFIX.json and PREFIX.csv, so that a run which
is interrupted goes on where it stopped.

Not covered: pictures of them (`pictures.py`), and two runs that write one file.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.files import write_text
from ..errors import InputError, RunError

_PACKAGES = ("mlx-clex", "mlx", "mlx-lm")
_PARTS = {"kind": str, "settings": dict, "keys": list, "versions": dict, "rows": list}


@dataclass
class Results:
    """Rows of one kind, from `open_results` or `read_results`."""

    kind: str  # what was measured, e.g. "perplexity"
    settings: dict[str, Any]  # all that changes a figure and is the same for every row
    keys: tuple[str, ...]  # the columns that tell one row from another
    rows: list[dict[str, Any]] = field(default_factory=list)
    prefix: Path | None = None  # of the files; None: kept in memory

    def find(self, **keys: Any) -> dict[str, Any] | None:
        """The first row with these values, or None."""
        return next((row for row in self.rows if _has(row, keys)), None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row in the place of the one with the same keys, and write the files.

        Args:
            row: finite numbers, texts and None by column.

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
        """Refuse to go on with figures of another model that was called the same.

        Args:
            label: what it is called in the rows' column of this name.
            model: its digest, as in the column "model".

        Raises:
            InputError: the message has the file and the name.
        """
        if any(row.get("label") == label and row.get("model") != model for row in self.rows):
            raise InputError(
                f"{self.path('.json')} has figures of another model called {label}: give another "
                "--output, or delete it."
            )

    def path(self, suffix: str) -> Path | None:
        """PREFIX + suffix; None where nothing is written."""
        return None if self.prefix is None else _path(self.prefix, suffix)

    def write(self) -> None:
        """Write PREFIX.json and PREFIX.csv; each is replaced whole."""
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
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        table = csv.DictWriter(text, columns or list(self.keys))
        table.writeheader()
        table.writerows(self.rows)
        write_text(_path(self.prefix, ".csv"), text.getvalue())


def open_results(
    prefix: str | Path | None, *, kind: str, settings: Mapping[str, Any], keys: Sequence[str]
) -> Results:
    """Results to add rows to, with those of an earlier run of the same kind and settings.

    Args:
        prefix: of the files, as the user gave it; ".json" at its end is taken off. None
            keeps the rows in memory.
        kind: what is measured.
        settings: all that changes a figure; not what a longer run would merely add.
        keys: the columns that tell one row from another.

    Raises:
        InputError: the file there is of another run, and what differs is said; or the files
            cannot be written.
    """
    # As a file gives them back: tuples as lists.
    results = Results(kind, json.loads(json.dumps(dict(settings))), tuple(keys))
    if prefix is None:
        return results
    results.prefix = Path(str(prefix).removesuffix(".json")).expanduser()
    file = _path(results.prefix, ".json")
    if file.exists():
        there = read_results(file)
        # A run that stopped before its first row has nothing to lose.
        if there.rows:
            _check_same(there, results, file)
            results.rows = there.rows
    try:
        results.prefix.parent.mkdir(parents=True, exist_ok=True)
        results.write()  # a folder without permission is found out before the work, not after
    except OSError as error:
        raise InputError(
            f"--output {prefix} cannot be written ({error.strerror}): give another."
        ) from error
    return results


def read_results(path: str | Path, *kinds: str) -> Results:
    """The results in a file.

    Args:
        path: PREFIX.json, or PREFIX alone.
        kinds: those that are of use; none given: any.

    Raises:
        InputError: no such file, no result file, or one of another kind.
    """
    prefix = Path(str(path).removesuffix(".json")).expanduser()
    file = _path(prefix, ".json")
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}): give the --output of an earlier run."
        ) from error
    except ValueError:
        whole = None
    if not _is_result(whole):
        raise InputError(f"{file} is no result file of mlx_clex: give one that --output wrote.")
    if kinds and whole["kind"] not in kinds:
        raise InputError(
            f"{file} has results of the kind {whole['kind']}, not {' or '.join(kinds)}."
        )
    return Results(whole["kind"], whole["settings"], tuple(whole["keys"]), whole["rows"], prefix)


def _check_same(there: Results, here: Results, file: Path) -> None:
    old = {"kind": there.kind, **there.settings}
    new = {"kind": here.kind, **here.settings}
    differences = [
        f"{name}: {json.dumps(old.get(name))} there, {json.dumps(new.get(name))} here"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise InputError(
            f"{file} has results of another run ({'; '.join(differences)}): give another "
            "--output, or delete it."
        )


def _is_result(whole: Any) -> bool:
    return (
        isinstance(whole, dict)
        and all(isinstance(whole.get(name), kind) for name, kind in _PARTS.items())
        and all(isinstance(row, dict) for row in whole["rows"])
        and all(key in row for row in whole["rows"] for key in whole["keys"])
    )


def _has(row: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(name in row and row[name] == value for name, value in values.items())


def _path(prefix: Path, suffix: str) -> Path:
    # Not with_suffix: it would take the ".5" of a prefix "factor-0.5" for one.
    return prefix.with_name(prefix.name + suffix)
