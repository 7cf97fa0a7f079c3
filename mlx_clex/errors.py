"""The two errors a command turns into one line and an exit status."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what to give instead.

    Commands print it as one line and exit with status 2. It is a ValueError, so code
    that calls the library needs no import from here to catch it.
    """


class RunError(RuntimeError):
    """A run with good input failed; commands print one line and exit with status 1."""


@contextmanager
def generating(where: Callable[[], str]) -> Iterator[None]:
    """Turn what mlx-lm's generation raises into these two.

    Args:
        where: how far it came, such as "after 3 tokens"; asked for where MLX fails, for want
            of memory above all.
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
