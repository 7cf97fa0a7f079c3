"""Write files and folders atomically.

Data is written beside the target under a name with `incomplete-PID`, flushed to disk and
then renamed. A killed process leaves this temporary file or folder behind; the next writer
of the same target deletes it.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line

_LARGEST_JSON = 200_000_000  # bytes; the largest known tokenizer.json has 40 million


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
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `target` when the block ends without an error.

    Missing parents are created, and deleted again after an error.

    Raises:
        OSError: the folder cannot be created, `target` exists already, or the disk is full.
    """
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    temporary = target.with_name(f"{target.name}.incomplete-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        temporary.rename(target)
        flush(target.parent)
    except BaseException:  # includes Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


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


def read_json(path: Path) -> Any:
    """Return the content of an untrusted JSON file.

    Raises:
        InputError: the file is missing, not a regular file, too large or not JSON.
    """
    try:
        # Reading a pipe or a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a regular file. Copy the checkpoint again.")
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{path} is larger than {_LARGEST_JSON} bytes. Copy it again.")
        return json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {one_line(error)}") from error


def delete_leftovers(target: Path) -> None:
    """Delete the temporary files and folders that killed processes left of this target."""
    mine = re.compile(
        rf"{re.escape(target.name)}\.incomplete-(\d+)"
        rf"|\.{re.escape(target.stem)}\.incomplete-(\d+){re.escape(target.suffix)}"
    )
    for path in target.parent.glob("*.incomplete-*"):
        match = mine.fullmatch(path.name)
        if match and not _runs(int(match[1] or match[2])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


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
