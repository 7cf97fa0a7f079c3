"""Dynamic NTK: a base that grows with the length."""

from typing import ClassVar

import numpy as np

from .base import Scaling
from .linear import FactorConfig


class Dynamic(Scaling):
    """Leaves fast pairs as trained and slows slow ones as far as the text needs.

    The strongest untrained baseline. Unlike mlx-lm's and transformers' `dynamic` the
    length moves in steps of max(256, L0 / 16) tokens, because every move of the cached
    keys rounds them once, and all keys move together. Not `ntk`, which has one scale
    for every length.
    """

    Config: ClassVar[type] = FactorConfig

    def scale_at(self, length: int) -> float:
        """`length` in tokens, rounded up to a whole step, over L0; at least 1."""
        if length <= self.trained_length:
            return 1.0
        step = max(256, -(-self.trained_length // 16))
        return -(-length // step) * step / self.trained_length

    def frozen_base(self, scale: float) -> float:
        """The rope_theta at which a plain rotary embedding has these frequencies."""
        growth = self.config.factor * scale - (self.config.factor - 1)
        return self.base * growth ** (self.dims / (self.dims - 2))

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: transformers, modeling_rope_utils.py, the type `dynamic`."""
        return self.frozen_base(scale) ** -(np.arange(0, self.dims, 2) / self.dims)
