"""Position interpolation: every frequency divided by one factor."""

import numpy as np

from .factor import FactorScaling


class Linear(FactorScaling):
    """Slows fast and slow pairs alike, so neighbouring tokens come to look nearer.

    Known as position interpolation, PI; needs fine-tuning. Not NTK-aware scaling, which
    leaves the fast pairs alone.
    """

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: arXiv 2306.15595, equation 4."""
        return self._base_inv_freq() / scale
