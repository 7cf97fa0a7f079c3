"""Warn of runs that are not expected to fit the machine, and refuse those that cannot.

On a Mac, a run that needs much more memory than there is can end in a kernel panic.

Not covered: the estimate itself (`diagnosis/memory.py`).
"""

import argparse
import contextlib
import math
from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from ..diagnosis.machine import Machine, size_text, this_machine
from ..diagnosis.memory import REFUSED, Reading, Training, peak, verdict
from ..diagnosis.plan import Change, advice, changes
from ..diagnosis.sizes import Sizes, sizes_of_model
from ..errors import InputError, say
from ..model.scaled_model import scaled


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add --force."""
    parser.add_argument(
        "--force",
        action="store_true",
        default=None,  # not given, so that a file of options can give it
        help=f"Run even if it is expected to need more than {REFUSED:g} times the memory of this "
        "machine.",
    )


def cache_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `Reading` that the options of a quantised cache give."""
    return {
        "step": args.prefill_step_size,
        "kv_bits": args.kv_bits,
        "kv_group": args.kv_group_size,
        "kv_start": args.quantized_kv_start,
    }


class MemoryCheck:
    """Checks runs of the model that was loaded last on this machine, and warns once."""

    def __init__(
        self,
        *,
        force: bool,
        processes: int = 1,
        kv_bits: bool = True,
        machine: Machine | None = None,
    ) -> None:
        """Check nothing yet.

        Args:
            force: warn where a run would be refused.
            processes: how many share a model that is read.
            kv_bits: the command has this option, so it may be advised.
            machine: None: this one.
        """
        self._force = force
        self._processes, self._kv_bits = processes, kv_bits
        self._machine = machine or this_machine()
        self._warned = False
        self._sizes: Sizes | None = None
        self._limit: int | None = None  # tokens that the model accepts

    def at_load(self, check: Callable[[], object]) -> Callable[[nn.Module], None]:
        """Return what `load` calls before it reads the weights: it measures, then checks."""

        def before_reading(model: nn.Module) -> None:
            self._sizes, self._limit = None, scaled(model).limit
            # A config that lacks a size is no reason not to load.
            with contextlib.suppress(InputError):
                self._sizes = sizes_of_model(model)
            check()

        return before_reading

    def __call__(self, run: Reading | Training, what: str, *, state: bool = False) -> float:
        """Check a run.

        Args:
            run: what is to be read or trained.
            what: subject of the message, such as "Reading 5,000 tokens".
            state: say what it needs where it fits, too.

        Returns:
            Bytes that MLX can use beside the run, negative where it is tight; infinite where the
            sizes of the model are not known.

        Raises:
            InputError: it needs more than 1.3 times the memory, and is not forced.
        """
        if self._sizes is None:
            return math.inf
        machine, sizes = self._machine, self._sizes
        if isinstance(run, Reading):
            sizes = sizes.shared(self._processes)
        asked = Change("", sizes, run)
        needed = peak(asked.parts(machine.back_end))
        found = verdict(needed, machine)
        left = machine.usable - needed
        if found == "fits" and state:
            say(f"{what} is expected to need {size_text(needed)}.")
        if found == "fits" or (self._warned and found == "tight"):
            return left
        advised = [
            change
            for change in changes(sizes, run)
            if self._kv_bits or "--kv-bits" not in change.options
        ]
        hint = advice(advised, machine)
        text = (
            f"{what} is expected to need {size_text(needed)}; MLX can use "
            f"{size_text(machine.usable)} of the {size_text(machine.memory)} here. {hint}"
        )
        if found == "too large" and not self._force:
            raise InputError(f"{text} --force runs it anyway.")
        self._warned = True
        say(text)
        return left

    def reading(self, length: int, **options: Any) -> float:
        """Check a text that is read and continued up to `length` tokens; see `__call__`.

        Args:
            length: tokens; those beyond what the model accepts are not counted, as they end a
                text or are refused.
            options: other fields of `Reading`.
        """
        run = Reading(length=max(1, min(length, self._limit or length)), **options)
        return self(run, f"Reading and continuing {run.length:,} tokens")
