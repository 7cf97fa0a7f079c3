"""Run a command: parse its options, do its work, report failure in one line.

Not covered: tracebacks of bugs in mlx_clex, which are shown in full.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import mlx.core as mx

from ..errors import InputError, RunError, one_line, shown
from .help import Formatter, group_options
from .names import DESCRIPTIONS

_SEEDS = range(1 << 32)  # mlx takes 64 bits, and training multiplies seeds


def command(
    name: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], None],
    example: str,
    parent: Callable[[], argparse.ArgumentParser] | None = None,
) -> Callable[..., int]:
    """Return the `main` of a command: it takes arguments and returns the exit status.

    Args:
        name: a key of `DESCRIPTIONS`.
        add_arguments, run: as in `run_command`.
        example: arguments for the example at the end of --help.
        parent: makes the parser of mlx-lm whose options the command also takes.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(
            add_arguments,
            run,
            prog=f"mlx_clex.{name}",
            description=DESCRIPTIONS[name],
            argv=argv,
            parents=[parent()] if parent else [],
            example=f"mlx_clex {name} {example}",
        )

    return main


def run_command(
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], None],
    *,
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
    example: str = "",
) -> int:
    """Parse the arguments, run the command, and return its exit status.

    Args:
        add_arguments: adds the command's options to a parser.
        run: does the work.
        prog: the name shown in usage and errors, e.g. "mlx_clex.generate".
        description: one sentence for --help.
        argv: the arguments; None takes the arguments of the process.
        parents: parsers whose options the command also takes; its own options replace them.
        example: a command line for the end of --help.

    Returns:
        0, 2 for bad input (one line on stderr), 1 for a run that failed (one line),
        130 for Ctrl-C. argparse itself exits with 2 for arguments it cannot parse.
    """
    # Messages name the command as the README does, however it was started.
    prog = prog.replace(".", " ", 1)
    parser = _Parser(
        prog=prog,
        description=description,
        parents=list(parents),
        # mlx-lm's parsers, used as parents, also define -h.
        conflict_handler="resolve",
        formatter_class=Formatter,
        epilog=f"example:\n  {example}" if example else None,
    )
    add_arguments(parser)
    group_options(parser)
    args = parser.parse_args(argv)
    # The user needs the text of a warning, not our source line.
    warnings.formatwarning = lambda message, *_, **__: f"[mlx_clex] {message}\n"
    try:
        check_seed(getattr(args, "seed", None))
        _keep_weights_wired()
        run(args)
    except InputError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has exited (`| head`), so nobody reads a message.
        sys.stderr.close()
        return 1
    except (RunError, OSError) as error:
        print(f"{prog}: failed: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def check_seed(seed: int | None) -> None:
    """Refuse a seed that a random number generator would not take.

    Raises:
        InputError: the message has the range.
    """
    # A YAML file may give any type; searching a range for another type than int takes minutes.
    if seed is not None and not (type(seed) is int and seed in _SEEDS):
        raise InputError(f"--seed must be within 0..{_SEEDS[-1]}, got {shown(seed)}.")


def _keep_weights_wired() -> None:
    """On Metal, let MLX keep as much memory resident as the system recommends, as mlx-lm does."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if isinstance(recommended, int) and mx.metal.is_available():
        mx.set_wired_limit(recommended)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")
