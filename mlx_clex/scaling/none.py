"""No scaling: the frequencies the base model was trained with."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InputError
from .base import Scaling


@dataclass(frozen=True)
class NoneConfig:
    """No fields."""


class NoScaling(Scaling):
    """Leaves fast and slow pairs as trained, so slow pairs reach untrained angles past L0.

    The baseline of every other method. Needs no training.
    """

    name: ClassVar[str] = "none"
    Config: ClassVar[type] = NoneConfig
    static: ClassVar[bool] = True

    def scale_at(self, length: int) -> float:
        """Return 1 for every length."""
        return 1.0

    @property
    def reach(self) -> int | None:
        """L0. Longer sequences run, but answers get worse."""
        return self.trained_length

    def check_scale(self, scale: float) -> float:
        """Refuse every scale but 1."""
        if scale != 1:
            raise InputError(
                f"A model without a scaling has no scale to set, got {scale!r}. Convert it with "
                "--scaling NAME first."
            )
        return 1.0

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        return self._base_inv_freq()
