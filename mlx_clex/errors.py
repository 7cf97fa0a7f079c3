"""The two errors that commands report in one line, and notes for the user.

Not covered: tracebacks of bugs in mlx_clex, which are shown in full.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST = 400  # characters of another library's message


class InputError(ValueError):
    """The user gave something that cannot be used; the message says what to give instead.

    Commands print it as one line and exit with status 2. It is a ValueError, so code
    that calls the library needs no import from here to catch it.
    """


class RunError(RuntimeError):
    """A run with valid input failed; commands print one line and exit with status 1."""


def say(text: str) -> None:
    """Print a note for the user on stderr."""
    print(f"[mlx_clex] {text}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line, cut if it is very long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


@contextmanager
def generating(where: Callable[[], str]) -> Iterator[None]:
    """Turn exceptions of mlx-lm's generation into InputError or RunError.

    Args:
        where: returns how far generation got, such as "after 3 tokens". Called when MLX fails,
            most often because memory is full.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except ValueError as error:
        # mlx-lm checks sampling and KV quantisation only when it uses them.
        hint = " Try another --kv-group-size." if "[quantize]" in str(error) else ""
        raise InputError(f"mlx-lm does not accept an option: {error}{hint}") from error
    except RuntimeError as error:
        raise RunError(f"MLX failed {where()}: {error}{watchdog_advice(error)}") from error


def watchdog_advice(error: BaseException, *, training: bool = False) -> str:
    """Return what to do if macOS ended a computation on the GPU that took too long, else ""."""
    if not any(text in str(error) for text in ("Timeout", "Impacting Interactivity")):
        return ""
    if training:
        return (
            " macOS ends GPU work that takes seconds while a display is on: turn the display off "
            "(caffeinate -s keeps the Mac awake), lower --max-seq-length, and go on with --resume."
        )
    return " macOS ends GPU work that takes seconds: read smaller steps, --prefill-step-size 512."
