"""NTK-aware scaling: one larger base for all pairs."""

from typing import ClassVar

import numpy as np

from .base import Scaling
from .linear import FactorConfig


class Ntk(Scaling):
    """Leaves the fastest pair as trained and slows the slowest by the whole scale.

    Works untrained up to a few times L0. CLEX starts from it, with 2t - 1 in place of
    the scale t. Not `dynamic`, whose scale follows the length.
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

    def frozen_base(self, scale: float) -> float:
        """The rope_theta at which a plain rotary embedding has these frequencies."""
        return self.base * scale ** (self.dims / (self.dims - 2))

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: NTK-aware scaled RoPE, as in section 3.1 of arXiv 2309.00071."""
        return self.frozen_base(scale) ** -(np.arange(0, self.dims, 2) / self.dims)
