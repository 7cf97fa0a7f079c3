"""Time alternatives in interleaved blocks, and compare them.

Blocks of stock mlx-lm, of ours and of stock again take turns, so that other load on the machine
affects all three. A ratio compares neighbouring blocks. Stock against stock shows the noise.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

STOCK, OURS, AGAIN = KINDS = ("stock", "ours", "stock again")
ALMOST = 0.99  # a goal of which the median may fall short by _SLACK, if the interval reaches it
_SLACK = 0.02


@dataclass(frozen=True)
class Comparison:
    """The blocks of one setting."""

    case: str
    length: int  # of `unit`
    seconds: Mapping[str, list[float]]  # kind -> seconds of each block
    goal: float | None = None  # speed of ours / stock; None: information only
    unit: str = "tokens"
    most_extra: float | None = None  # seconds that ours may take longer, instead of a goal
    memory: Mapping[str, float] = field(default_factory=dict)  # kind -> peak in bytes
    memory_goal: float | None = None  # peak of ours / stock

    def ratio(self, kind: str) -> tuple[float, float, float]:
        """Return the median of stock's seconds / a kind's, and its 95 % bootstrap interval."""
        return _median([stock / other for stock, other in self._pairs(kind)])

    def extra(self) -> tuple[float, float, float]:
        """Return the median of our seconds - stock's, and its 95 % bootstrap interval."""
        return _median([other - stock for stock, other in self._pairs(OURS)])

    def _pairs(self, kind: str) -> list[tuple[float, float]]:
        return list(zip(self.seconds[STOCK], self.seconds[kind], strict=True))

    @property
    def met(self) -> bool | None:
        """Return whether the goals are met, as the suite defines it; None: there is none."""
        if self.most_extra is not None:
            return self.extra()[0] <= self.most_extra
        if self.goal is None:
            return None
        median, _, high = self.ratio(OURS)
        fast = high >= self.goal and median >= self.goal - (_SLACK if self.goal == ALMOST else 0)
        return fast and (self.memory_goal is None or self.memory_ratio <= self.memory_goal)

    @property
    def memory_ratio(self) -> float:
        """Return our peak of memory / stock's."""
        return self.memory[OURS] / self.memory[STOCK]

    def row(self, first: "Comparison | None" = None) -> dict[str, object]:
        """Return the figures for a result file; growth is against the `first` length."""
        ours, noise = self.ratio(OURS), self.ratio(AGAIN)
        growth = {}
        if first is not None:
            for kind in (OURS, STOCK):
                here, there = (statistics.median(its.seconds[kind]) for its in (self, first))
                growth[kind] = here / there
        return {
            "case": self.case,
            "length": self.length,
            "unit": self.unit,
            "blocks": len(self.seconds[STOCK]),
            "stock_seconds": statistics.median(self.seconds[STOCK]),
            "seconds": statistics.median(self.seconds[OURS]),
            "extra_seconds": self.extra()[0],
            **dict(zip(("ratio", "low", "high"), ours, strict=True)),
            **dict(zip(("noise", "noise_low", "noise_high"), noise, strict=True)),
            "growth": growth,
            "memory": dict(self.memory),
            "goal": self.goal,
            "most_extra": self.most_extra,
            "memory_goal": self.memory_goal,
            "met": self.met,
        }


@dataclass(frozen=True)
class NotRun:
    """A setting that cannot run here."""

    case: str
    length: int  # tokens
    reason: str


def interleave(
    blocks: int,
    block: Callable[[str], object],
    prepare: Callable[[str], object] = lambda kind: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each block by kind; the order of kinds rotates each round.

    Args:
        blocks: of each kind; one more warms up.
        block: runs a block of a kind. A float that it returns is taken as its seconds.
        prepare: called before a block, and not timed.
        clock: returns seconds.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(blocks + 1):
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            prepare(kind)
            start = clock()
            measured = block(kind)
            taken = measured if isinstance(measured, float) else clock() - start
            if number:
                seconds[kind].append(taken)
    return seconds


def _median(values: list[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval, from 10,000 resamplings."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (10_000, len(values))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return statistics.median(values), float(low), float(high)
