"""Time alternatives in interleaved blocks, and compare them.

Blocks of stock mlx-lm, of ours and of stock again take turns, so that other load on the machine
affects all three. A ratio compares neighbouring blocks. Stock against stock shows the noise.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

STOCK, OURS, AGAIN = KINDS = ("stock", "ours", "stock again")
_SLACK = 0.02  # the median may be so far below the goal, if the interval reaches it


@dataclass(frozen=True)
class Comparison:
    """The blocks of one setting."""

    case: str
    length: int  # tokens
    seconds: Mapping[str, list[float]]  # kind -> seconds of each block
    goal: float  # speed of ours / stock

    def ratio(self, kind: str) -> tuple[float, float, float]:
        """Return the median of stock's seconds / a kind's, and its 95 % bootstrap interval."""
        pairs = zip(self.seconds[STOCK], self.seconds[kind], strict=True)
        ratios = [stock / other for stock, other in pairs]
        return (statistics.median(ratios), *interval(ratios))

    @property
    def met(self) -> bool:
        """Return whether the interval reaches the goal and the median is close to it."""
        median, _, high = self.ratio(OURS)
        return high >= self.goal and median >= self.goal - _SLACK

    def row(self) -> dict[str, object]:
        """Return the figures for a result file."""
        ours, noise = self.ratio(OURS), self.ratio(AGAIN)
        return {
            "case": self.case,
            "length": self.length,
            "blocks": len(self.seconds[STOCK]),
            "stock_seconds": statistics.median(self.seconds[STOCK]),
            "seconds": statistics.median(self.seconds[OURS]),
            **dict(zip(("ratio", "low", "high"), ours, strict=True)),
            **dict(zip(("noise", "noise_low", "noise_high"), noise, strict=True)),
            "goal": self.goal,
            "met": self.met,
        }


def interleave(
    blocks: int,
    block: Callable[[str], object],
    prepare: Callable[[str], object] = lambda kind: None,
) -> dict[str, list[float]]:
    """Return the seconds of each block by kind; the order of kinds rotates each round.

    Args:
        blocks: of each kind; one more warms up.
        block: runs a block of a kind.
        prepare: called before a block, and not timed.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(blocks + 1):
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            prepare(kind)
            start = time.perf_counter()
            block(kind)
            if number:
                seconds[kind].append(time.perf_counter() - start)
    return seconds


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median, from 10,000 resamplings."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)
