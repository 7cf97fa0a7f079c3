"""The two errors that commands report in one line, where they come from, and notes for the user.

Not covered: tracebacks of bugs in mlx_clex, which are shown in full.
"""

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_LONGEST = 400  # characters of another library's message
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE)
_SHOWN = 80  # characters of a value


class InputError(ValueError):
    """The user gave something that cannot be used; the message says what to give instead.

    Commands print it as one line and exit with status 2. It is a ValueError, so code
    that calls the library needs no import from here to catch it.
    """


class RunError(RuntimeError):
    """A run with valid input failed; commands print one line and exit with status 1."""


def import_extra(module: str, extra: str, what: str) -> Any:
    """Return a module that an extra of this package installs.

    Args:
        module: its name.
        extra: name of the extra.
        what: what needs it, the start of the message.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(f"{what} needs {package}: pip install 'mlx-clex[{extra}]'.") from error


def say(text: str) -> None:
    """Print a note for the user on stderr."""
    print(f"[mlx_clex] {text}", file=sys.stderr)


def one_line(error: BaseException | str) -> str:
    """Return a text, or the message of an exception, in one line, cut if it is very long.

    Control characters, which a file may have put there, are escaped.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error) is KeyError:
        text += " is missing"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def shown(value: Any) -> str:
    """Return a value from a file as Python writes it, cut if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of 5,000 digits, or lists within lists
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


@contextmanager
def reading(what: str, *, always: bool = False) -> Iterator[None]:
    """Turn whatever a stranger's file causes inside into one InputError.

    The libraries that read checkpoints raise anything on damaged or hostile files: RecursionError
    for nested JSON, KeyError for a missing setting, and, in tokenizers, a panic that is no
    Exception.

    Args:
        what: start of the message, such as "The folder x does not load".
        always: start the message of an InputError so, too.

    Raises:
        InputError: with the message of the exception.
        OSError: the disk is full, or the like, which no file causes.
    """
    try:
        yield
    except (RunError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, InputError) and not always:
            raise
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        raise InputError(f"{what}: {one_line(error).rstrip('.')}.") from error


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
    except (ValueError, NotImplementedError) as error:
        # mlx-lm checks sampling and KV quantisation only when it uses them.
        if "quantiz" in str(error).lower():
            raise InputError(
                "The cache of this model cannot be quantised with this --kv-bits and "
                f"--kv-group-size: {error}"
            ) from error
        raise InputError(f"mlx-lm does not accept an option: {error}") from error
    except LookupError as error:
        raise InputError(
            f"The model gave a token that its tokenizer lacks ({one_line(error)}). The tokenizer "
            "is damaged, or another model's: copy it again."
        ) from error
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
    return (
        " macOS ends GPU work that takes seconds: read a shorter text, or smaller steps "
        "(--prefill-step-size 512, if the command has it)."
    )
