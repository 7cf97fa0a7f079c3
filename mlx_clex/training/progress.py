"""Counters of a training run, which a save holds, and the check of the figures it reports.

Not covered: bars (`progress_bars.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError, shown


def not_finite(figures: Mapping[str, float]) -> str:
    """Return which figures are not finite, with their values; "" if all are."""
    broken = {name: value for name, value in figures.items() if not math.isfinite(value)}
    return ", ".join(f"{name} is {value:g}" for name, value in broken.items())


@dataclass
class Progress:
    """How far a run is.

    Raises:
        InputError: a number of a damaged save is not usable.
    """

    iteration: int = 0
    trained_tokens: int = 0
    # Since the last report:
    losses: float = 0.0  # nats, summed over tokens
    tokens: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            right = type(value) is int or (name == "losses" and type(value) is float)
            if not right or not 0 <= value < math.inf:
                raise InputError(f"{name} is {shown(value)}; it must be a number of at least 0.")
