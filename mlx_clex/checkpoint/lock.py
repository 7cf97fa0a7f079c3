"""One writer a target at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import say


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a file or folder, and wait with a note while another process holds it.

    The lock is `.NAME.lock` beside the target, which has the number of the process. The
    system releases it when that process ends, however it ends, and the next one takes over
    a file that a killed process left.

    Args:
        target: what is going to be written; its folder is made where it is missing.
    """
    path = target.with_name(f".{target.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
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
