"""Dynamic NTK: a base that grows with the length."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Scaling
from .config import option
from .factor import FactorConfig


@dataclass(frozen=True, kw_only=True)
class DynamicConfig(FactorConfig):
    """How fast the base grows."""

    factor: float = option(4.0, "Growth of the base per trained length; 1 is NTK's own.")


class Dynamic(Scaling):
    """Leaves fast pairs as trained and slows slow pairs by the length of the text.

    The strongest untrained baseline. Unlike `dynamic` in mlx-lm and transformers, the length is
    rounded up to steps of max(256, L0 / 16) tokens, because each rotation of the cached keys to a
    new scale rounds them once. Not `ntk`, which has one scale for every length.
    """

    name: ClassVar[str] = "dynamic"
    Config: ClassVar[type] = DynamicConfig
    in_transformers: ClassVar[bool] = True

    @property
    def largest_scale(self) -> float:
        """The factor, the largest scale in training; at inference the scale has no limit."""
        return self.config.factor

    def scale_at(self, length: int) -> float:
        """Return `length`, rounded up to a whole step, / L0, at least 1; `length` in tokens."""
        if length <= self.trained_length:
            return 1.0
        step = max(256, -(-self.trained_length // 16))
        return -(-length // step) * step / self.trained_length

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: transformers, modeling_rope_utils.py, the type `dynamic`."""
        growth = self.config.factor * scale - (self.config.factor - 1)
        return self._base_inv_freq() * growth ** -(np.arange(0, self.dims, 2) / (self.dims - 2))
