"""Counters of a training run, which a save holds.

Not covered: bars (`progress_bars.py`).
"""

import math
from dataclasses import dataclass

from ..errors import InputError, shown


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
