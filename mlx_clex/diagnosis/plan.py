"""Say which runs of a model fit a machine, and what to change about those that do not.

Not covered: the estimate itself (`memory.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .machine import Machine, size_text
from .memory import (
    Parts,
    Reading,
    Training,
    decoding,
    longest,
    peak,
    reading,
    training,
    verdict,
)
from .sizes import Sizes

_STEP = 512  # tokens of a smaller prefill step


@dataclass(frozen=True)
class Change:
    """A run with some options changed."""

    options: str  # as they are typed; "" for the run that was asked for
    sizes: Sizes
    run: Reading | Training

    def parts(self, back_end: str, length: int | None = None) -> Parts:
        """Return the parts of its peak, at another length if one is given."""
        run = self.run if length is None else replace(self.run, length=length)
        if isinstance(run, Training):
            return training(self.sizes, run, back_end)
        # Reading needs more than decoding but for a short prompt and a large vocabulary.
        both = reading(self.sizes, run, back_end), decoding(self.sizes, run, back_end)
        return max(both, key=peak)

    def longest(self, machine: Machine) -> int:
        """Return the greatest length that fits, in tokens.

        No text longer than the model's reach is looked for, unless one was asked for.
        """
        reach = self.sizes.reach if isinstance(self.run, Reading) else None
        limits = {} if reach is None else {"limit": max(reach, self.run.length)}
        return longest(lambda n: self.parts(machine.back_end, n), machine.usable, **limits)


def changes(
    sizes: Sizes, run: Reading | Training, in_4_bits: Callable[[], Sizes] | None = None
) -> list[Change]:
    """Return the run as it is, and with options that need less memory.

    Args:
        sizes: the model's.
        run: what is asked for.
        in_4_bits: returns the sizes with weights of 4 bits; None: they are quantised.
    """
    found = [Change("", sizes, run)]
    if isinstance(run, Reading):
        shorter = ""
        if run.step > _STEP:
            run, shorter = replace(run, step=_STEP), f"--prefill-step-size {_STEP}"
            found.append(Change(shorter, sizes, run))
        for bits in (8, 4) if sizes.caches.quantisable else ():
            if (run.kv_bits or 16) > bits:
                run = replace(run, kv_bits=bits)
                found.append(Change(f"{shorter} --kv-bits {bits}".strip(), sizes, run))
        if run.kv_bits and run.plain * sizes.itemsize > run.length * run.kv_bits / 8:
            # The text before --quantized-kv-start is most of the cache.
            earlier = replace(run, kv_start=0)
            if earlier.plain < run.plain:
                options = f"{found[-1].options} --quantized-kv-start 0".strip()
                found.append(Change(options, sizes, earlier))
    else:
        if not run.grad_checkpoint:
            run = replace(run, grad_checkpoint=True)
            found.append(Change("--grad-checkpoint", sizes, run))
        if run.batch > 1:
            run = replace(run, batch=1)
            found.append(Change(f"{found[-1].options} --batch-size 1".strip(), sizes, run))
    if in_4_bits is not None and not (isinstance(run, Training) and run.full):
        found.append(Change(f"{found[-1].options} and 4-bit weights".strip(), in_4_bits(), run))
    return found


def advice(found: Sequence[Change], machine: Machine) -> str:
    """Return a sentence: which of the changes makes the run fit."""
    length = found[0].run.length
    for change in found:
        if peak(change.parts(machine.back_end)) <= machine.usable:
            return f"{length:,} tokens fit{_with(change)}."
    best = max(found, key=lambda change: change.longest(machine))
    reached = best.longest(machine)
    if not reached:
        return "No length fits: take a smaller model, or a machine with more memory."
    return f"{length:,} tokens do not fit; {reached:,} do{_with(best)}."


def _with(change: Change) -> str:
    if not change.options:
        return " as they are"
    return f" {'' if change.options.startswith('and') else 'with '}{change.options}"


def memory_rows(sizes: Sizes, machine: Machine, length: int) -> Iterator[tuple[str, str]]:
    """Yield rows for `doctor`: the peak at a length, and the longest that fits."""
    found = changes(sizes, Reading(length=length))
    parts = reading(sizes, Reading(length=length), machine.back_end)
    yield "memory", f"{machine}"
    yield "while reading", f"{length} tokens: {size_text(peak(parts))} ({parts_text(parts)})"
    yield "fits", advice(found, machine)
    if verdict(peak(found[-1].parts(machine.back_end)), machine) == "too large":
        yield "problem", f"{length} tokens do not fit this machine. See mlx_clex plan."


def parts_text(parts: Parts) -> str:
    """Return the parts that are not zero, largest first."""
    shown = sorted(((size, name) for name, size in parts.items() if size >= 1), reverse=True)
    return ", ".join(f"{name} {size_text(size)}" for size, name in shown)
