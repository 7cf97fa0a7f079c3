"""Command: list and delete what mlx_clex keeps in its cache folder.

In the folder are conversions of checkpoints and .gguf files that were given as `--model`, and
tokens of texts. All of it is made again when it is needed.

Not covered: the cache of huggingface-hub, for which there is `hf cache`.
"""

import argparse
import difflib
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .checkpoint.files import delete_all_leftovers
from .checkpoint.lock import locked
from .commands.run_command import command
from .errors import InputError
from .loading import DEFAULT_CACHE

_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"))  # seconds


class Entry(NamedTuple):
    """A conversion, or the tokens of all texts."""

    path: Path
    nbytes: int
    made: float  # seconds since 1970


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--delete",
        nargs="+",
        metavar="NAME",
        help="Delete entries by their names in the list. Default: delete none.",
    )
    group.add_argument(
        "--delete-all", action="store_true", help="Delete every entry. Default: delete none."
    )


def run(args: argparse.Namespace) -> None:
    """List the entries, or delete some; leftovers of killed commands are deleted either way.

    Raises:
        InputError: there is no entry of a name.
    """
    folder = DEFAULT_CACHE.expanduser()
    delete_all_leftovers(folder)
    entries = {entry.path.name: entry for entry in _entries(folder)}
    names = list(entries) if args.delete_all else args.delete or []
    for name in names:
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1, cutoff=0.3)
            hint = f"Did you mean {near[0]}?" if near else f"{folder} has no entries."
            raise InputError(f"There is no entry {name!r}. {hint}")
    if args.delete_all or args.delete:
        for name in names:
            with locked(entries[name].path):
                shutil.rmtree(entries[name].path)
        freed = sum(entries[name].nbytes for name in names)
        print(f"Deleted {len(names)} entries from {folder}, {freed / 1e9:.2f} GB.")
        return
    for name, entry in sorted(entries.items()):
        print(f"{entry.nbytes / 1e9:8.2f} GB  {_age(entry.made):>10}  {name}")
    total = sum(entry.nbytes for entry in entries.values())
    print(f"{total / 1e9:8.2f} GB in {folder}")
    if entries:
        print("Delete with: mlx_clex cache --delete NAME")


def _entries(folder: Path) -> list[Entry]:
    if not folder.is_dir():
        return []
    return [
        Entry(path, sum(f.stat().st_size for f in path.rglob("*")), path.stat().st_mtime)
        for path in folder.iterdir()
        if path.is_dir() and ".incomplete-" not in path.name
    ]


def _age(made: float) -> str:
    seconds = time.time() - made
    for length, unit in _UNITS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "new"


main = command("cache", add_arguments, run, "--delete-all")


if __name__ == "__main__":
    sys.exit(main())
