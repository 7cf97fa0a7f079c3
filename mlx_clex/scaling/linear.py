"""Position interpolation: every frequency divided by one factor."""

from typing import Any, ClassVar

import numpy as np

from .factor import FactorScaling


class Linear(FactorScaling):
    """Slows fast and slow pairs alike, so neighbouring tokens are harder to tell apart.

    Known as position interpolation, PI; needs fine-tuning. Not NTK-aware scaling, which
    leaves the fast pairs as trained.
    """

    name: ClassVar[str] = "linear"
    in_transformers: ClassVar[bool] = True

    def stock_entry(self, scale: float) -> dict[str, Any]:
        """Return the entry of the same name."""
        return {"type": self.name, "factor": scale}

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: arXiv 2306.15595, equation 4."""
        return self._base_inv_freq() / scale
