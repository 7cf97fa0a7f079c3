"""Position interpolation: every frequency divided by one factor."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError
from .base import Scaling


@dataclass(frozen=True, kw_only=True)
class FactorConfig:
    """Of the methods that have one number to choose."""

    factor: float = 4.0  # longest length / trained length

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise InputError(f"rope_scaling.factor must be >= 1, got {self.factor}.")


class Linear(Scaling):
    """Slows fast and slow pairs alike, so neighbouring tokens come to look nearer.

    Known as position interpolation, PI; needs fine-tuning. Not NTK-aware scaling, which
    leaves the fast pairs alone.
    """

    Config: ClassVar[type] = FactorConfig
    static: ClassVar[bool] = True

    def scale_at(self, length: int) -> float:
        """The configured factor for every length, in tokens."""
        return self.config.factor

    @property
    def reach(self) -> int | None:
        """L0 * factor; it runs on past it, badly."""
        return int(self.trained_length * self.config.factor)

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: arXiv 2306.15595, equation 4."""
        return self._base_inv_freq() / scale
