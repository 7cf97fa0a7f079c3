"""Open files that may come from a stranger, and write files and folders atomically.

Data is written beside the target under a name with `incomplete-PID`, flushed to disk and
then renamed. A killed process leaves this temporary file or folder behind; the next writer
of the same target deletes it.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, one_line, say

# Largest files that are parsed, in bytes, some times the largest known: 40 million for a
# tokenizer.json. Parsed, JSON takes up to twenty times its size.
_LARGEST_TEXT = 100_000_000
_LARGEST_CONFIG = 8_000_000
_DEEPEST = 64  # lists and objects within each other


def expand(name: str | Path, option: str = "") -> Path:
    """Return a path in which ~ is replaced by the home folder.

    Args:
        name: as the user gave it.
        option: put before the name in an error.

    Raises:
        InputError: it begins with ~NAME, and there is no such user; or no path has its characters
            or its type.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"{option}{name!r} is no path; give a text.")
    if "\0" in str(name):
        raise InputError(f"{option}{str(name)!r} is no path: it has a NUL character.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{option}{name}: there is no such user. Give the path without ~."
        ) from error


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `target` when the block ends without an error.

    The path has the suffix of `target`.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    delete_leftovers(target)
    temporary = target.with_name(f".{target.stem}.incomplete-{os.getpid()}{target.suffix}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(target)
        flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `target` when the block ends without an error.

    Args:
        target: the folder to be; its missing parents are created, and deleted after an error.
        replace: delete a `target` that exists, just before the renaming.

    Raises:
        OSError: the folder cannot be created, `target` exists already, or the disk is full.
    """
    with scratch_folder(target) as temporary:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        if replace and target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        flush(target.parent)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, and delete it if it is there when the block ends.

    Raises:
        OSError: the folder cannot be created.
    """
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    temporary = target.with_name(f"{target.name}.incomplete-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def write_text(target: Path, text: str) -> None:
    """Replace a file by this text, in UTF-8 with unchanged line ends.

    Raises:
        OSError: the file cannot be written.
    """
    with new_file(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        out.write(text)


def write_json(target: Path, value: Any) -> None:
    """Replace a file by this value as JSON.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(target, json.dumps(value, indent=4) + "\n")


def open_regular(path: Path, *, pipe: bool = False) -> BinaryIO:
    """Open a file for reading. Reading a pipe, a device or a folder may never end.

    Args:
        path: the file.
        pipe: allow a pipe too, such as a shell's `<(command)`.

    Raises:
        InputError: it is not a regular file.
        OSError: it is missing, or cannot be read.
    """
    # Opening a pipe would wait for a writer.
    handle = os.open(path, os.O_RDONLY | (0 if pipe else os.O_NONBLOCK))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode) and not (pipe and stat.S_ISFIFO(mode)):
        os.close(handle)
        raise InputError(f"{path} is not a regular file. Give the path of a file, or copy it here.")
    return os.fdopen(handle, "rb")


def check_link(file: Path, folder: Path) -> None:
    """Refuse a link that leads out of the folder that the user named.

    Args:
        file: a path in the folder; it need not be a link.
        folder: the folder, or a link to it.

    Raises:
        InputError: it leads out, or to nothing.
    """
    if not file.is_symlink():
        return
    inside = folder.resolve()
    # In the hub's cache the files of a snapshot are links to blobs two folders up.
    allowed = (inside, inside.parent.parent / "blobs")
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        raise InputError(f"{file} is a link to a file that is not there. Copy it again.") from None
    if not any(target.is_relative_to(top) for top in allowed):
        raise InputError(
            f"{file} is a link that leads out of its folder. Replace it by a copy of the file."
        )


def largest_size(name: str) -> int:
    """Return the most bytes of a text or JSON file of a checkpoint, by its name."""
    small = name.endswith(("config.json", "_map.json", ".jinja"))
    return _LARGEST_CONFIG if small else _LARGEST_TEXT


def read_json(path: Path) -> Any:
    """Return the content of an untrusted JSON file.

    Raises:
        InputError: the file is missing, not a regular file, too large or not JSON.
    """
    try:
        with open_regular(path) as file:
            data = file.read(largest_size(path.name) + 1)
        if len(data) > largest_size(path.name):
            raise InputError(
                f"{path} is larger than {largest_size(path.name)} bytes. Copy it again."
            )
        value = json.loads(data.decode("utf-8"))
        if _depth(value) > _DEEPEST:
            raise InputError(f"{path} has lists and objects nested more than {_DEEPEST} deep.")
        return value
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {one_line(error)}") from error


def _depth(value: Any) -> int:
    """Return how deep lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth


def delete_leftovers(target: Path) -> None:
    """Delete the temporary files and folders that killed processes left of this target."""
    mine = re.compile(
        rf"{re.escape(target.name)}\.incomplete-\d+"
        rf"|\.{re.escape(target.stem)}\.incomplete-\d+{re.escape(target.suffix)}"
    )
    _delete_leftovers(path for path in target.parent.iterdir() if mine.fullmatch(path.name))


def delete_all_leftovers(folder: Path) -> None:
    """Delete what killed processes left of any target in a folder."""
    if folder.is_dir():
        _delete_leftovers(folder.iterdir())


def _delete_leftovers(paths: Iterable[Path]) -> None:
    for path in paths:
        match = re.search(r"\.incomplete-(\d+)", path.name)
        if match and not _runs(int(match[1])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            say(f"Deleted {one_line(path.name)}, which a killed command left.")


def flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _runs(pid: int) -> bool:
    """Return whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # a process of another user
    return True
