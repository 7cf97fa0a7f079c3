"""Saves of a training run, each whole or not there.

    <folder>/checkpoints/0000100/   everything, the state to resume from included
    <folder>/current                a link to the newest of them
    <folder>/adapters.safetensors   links through `current`, as are adapter_config.json
                                    and the other files that loaders want

A save is written beside its final name, flushed to the disk and renamed; then `current`
is replaced in one step, so all files at the root change together. Who reads several of
them should resolve `current` first (`newest`).

Not covered: what the arrays mean.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.adapters import ADAPTER_SCALING, ADAPTERS, CONFIG, CURRENT, EXTRA_WEIGHTS
from ..checkpoint.files import check_link, delete_all_leftovers, flush, new_folder
from ..checkpoint.safetensors_file import array_bytes, info_of, write
from ..errors import InputError

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_AT_ROOT = (ADAPTERS, CONFIG, ADAPTER_SCALING, EXTRA_WEIGHTS)
_FOLDER = "checkpoints"

Arrays = Mapping[str, mx.array]


class Checkpoints:
    """The saves in one folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Use a folder, which need not exist.

        Args:
            folder: `--adapter-path`.
            keep: how many saves stay, at least 1.

        Raises:
            InputError: the folder has links that lead out of it.
        """
        self.folder = folder
        self.keep = keep
        for name in (_FOLDER, CURRENT):  # nothing is read or written outside the folder
            check_link(folder / name, folder)

    @property
    def newest(self) -> Path | None:
        """The newest complete save, or None.

        Raises:
            InputError: the save lacks its state; a run that began anew would overwrite it.
        """
        current = self.folder / CURRENT
        if not current.exists() and not current.is_symlink():
            return None
        if not (current / STATE).is_file():
            raise InputError(
                f"The save {current.resolve()} is damaged: it has no {STATE}. To go on from an "
                f"older one beside it, point the link {current} there, or give another "
                "--adapter-path."
            )
        return current.resolve()

    def save(
        self, step: int, arrays: Mapping[str, Arrays], config: Mapping[str, Any], state: Any
    ) -> Path:
        """Write a save and make it the current one.

        Args:
            step: its number; one of that number is replaced.
            arrays: name of a safetensors file to its tensors.
            config: for adapter_config.json.
            state: what resuming needs beside arrays, as JSON.

        Raises:
            OSError: the disk is full, or the like; the saves before it stay as they were.
        """
        target = self.folder / _FOLDER / f"{step:07d}"
        # One of that number is of a run that was resumed from an earlier save.
        with new_folder(target, replace=True) as temporary:
            for name, tensors in arrays.items():
                entries = [
                    (key, info_of(value), lambda value=value: array_bytes(value))
                    for key, value in tensors.items()
                ]
                write(temporary / name, entries, "mlx")
            _write_json(temporary / CONFIG, config)
            _write_json(temporary / STATE, state)
        self._make_current(target)
        self._prune(target)
        return target

    def _make_current(self, target: Path) -> None:
        _link(self.folder / CURRENT, Path(_FOLDER) / target.name)
        for name in _AT_ROOT:
            link = self.folder / name
            if (target / name).is_file():
                if not link.is_symlink():
                    _link(link, Path(CURRENT) / name)
            elif link.is_symlink():
                link.unlink()
        flush(self.folder)

    def _prune(self, target: Path) -> None:
        delete_all_leftovers(target.parent)
        saves = sorted(path for path in target.parent.iterdir() if path.name.isdigit())
        for path in saves[: -self.keep]:
            if path != target:
                shutil.rmtree(path, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _link(link: Path, to: Path) -> None:
    """Make or replace a symbolic link in one step."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(to)
    temporary.replace(link)
