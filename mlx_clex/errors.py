"""The two errors a command turns into one line and an exit status."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what to give instead.

    Commands print it as one line and exit with status 2. It is a ValueError, so code
    that calls the library needs no import from here to catch it.
    """


class RunError(RuntimeError):
    """A run with good input failed; commands print one line and exit with status 1."""
