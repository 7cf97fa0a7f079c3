"""What the user hears: the two errors that commands report in one line, and notes.

Not covered: tracebacks of our own mistakes, which are shown on purpose.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST = 400  # characters of another library's message


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what to give instead.

    Commands print it as one line and exit with status 2. It is a ValueError, so code
    that calls the library needs no import from here to catch it.
    """


class RunError(RuntimeError):
    """A run with good input failed; commands print one line and exit with status 1."""


def say(text: str) -> None:
    """Print a note for the user on stderr."""
    print(f"[mlx_clex] {text}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of any exception in one line, shortened where it is very long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


@contextmanager
def generating(where: Callable[[], str]) -> Iterator[None]:
    """Turn what mlx-lm's generation raises into the two errors.

    Args:
        where: says how far generation came, for example "after 3 tokens"; called when MLX
            fails, which is mostly for want of memory.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except ValueError as error:
        # mlx-lm checks sampling and KV quantisation only where it uses them.
        hint = " Try another --kv-group-size." if "[quantize]" in str(error) else ""
        raise InputError(f"mlx-lm refused an option: {error}{hint}") from error
    except RuntimeError as error:
        raise RunError(f"MLX failed {where()}: {error}") from error
