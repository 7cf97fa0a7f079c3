"""One writer a target at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, say


@contextmanager
def locked(target: Path, option: str = "") -> Iterator[None]:
    """Hold the lock of a file or folder, and wait with a note while another process holds it.

    The lock is `.NAME.lock` beside the target, which has the number of the process. The
    system releases it when that process ends, however it ends, and the next one takes over
    a file that a killed process left.

    Args:
        target: what is going to be written; its folder is made where it is missing.
        option: the option and value that gave the target, for messages.

    Raises:
        InputError: the folder of the target cannot be made or written.
    """
    path = target.with_name(f".{target.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(
            f"{option or target} cannot be written ({reason}). Give another path."
        ) from error
    told = False
    while True:
        with path.open("a+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    file.seek(0)
                    say(f"Waiting for process {file.read()}, which writes {target}.")
                    told = True
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                same = False
            if not same:
                continue  # the holder before deleted the file that was waited for
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
