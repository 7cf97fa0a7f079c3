"""Confidence intervals of mean losses, and of the ratio of two perplexities.

Not covered: the measurement of losses (`perplexity.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FEWEST_WINDOWS = 5  # fewer windows give no useful interval


@dataclass(frozen=True)
class Ratio:
    """A perplexity / another one of the same targets, with its 95 % interval."""

    value: float
    interval: tuple[float, float] | None  # None below five windows


def paired_ratio(losses: Sequence[float], others: Sequence[float]) -> Ratio:
    """Return exp(mean difference of the losses) of windows with the same targets.

    Some windows are harder than others; pairing removes this difference. The interval (Student's
    t for the mean log ratio of a window) is therefore much narrower than those of the two
    perplexities.

    Args:
        losses: mean loss of each window, nats, as in `Score`.
        others: mean losses of the same windows with another context or model.
    """
    logs = np.asarray(losses) - np.asarray(others)
    mean, margin = float(logs.mean()), half_interval(logs)
    return Ratio(exp(mean), None if margin is None else (exp(mean - margin), exp(mean + margin)))


def half_interval(values: np.ndarray) -> float | None:
    """Return half the 95 % confidence interval of the mean; None below five values."""
    count = len(values)
    if count < FEWEST_WINDOWS:
        return None
    return student_t(0.95, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)


def student_t(level: float, freedom: int) -> float:
    """Return the two-sided quantile of Student's t distribution: P(|t| < result) = `level`.

    Args:
        level: above 0, below 1.
        freedom: degrees of freedom, at least 4; the error is 0.3 % at 4 and less above.

    Source: Abramowitz and Stegun, 26.7.5, the expansion about the normal distribution.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def exp(loss: float) -> float:
    """Return e^loss, at most the largest number of a result file, about 1e100."""
    return math.exp(min(loss, 230))
