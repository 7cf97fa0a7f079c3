"""NTK-aware scaling: one larger base for all pairs."""

from typing import ClassVar

import numpy as np

from .factor import FactorScaling


class Ntk(FactorScaling):
    """Leaves the fastest pair as trained and slows the slowest pair by the whole scale.

    Works untrained for lengths up to a few times L0. CLEX starts from it, with 2t - 1 in place of
    the scale t. Not `dynamic`, whose scale follows the length.
    """

    name: ClassVar[str] = "ntk"

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: NTK-aware scaled RoPE, as in section 3.1 of arXiv 2309.00071."""
        return self._base_inv_freq() * scale ** -(np.arange(0, self.dims, 2) / (self.dims - 2))
