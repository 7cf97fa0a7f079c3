"""One batch of token ids, its targets and their weights."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of text: L tokens each, and what follows each of them."""

    tokens: np.ndarray  # ids, (B, L)
    targets: np.ndarray  # ids, (B, L)
    weights: np.ndarray  # of each target's loss, float32, (B, L)

    def rows(self, part: int, parts: int) -> "Batch":
        """One of several equal shares of the rows."""
        return Batch(*(a[part::parts] for a in self))

    def cut(self, pieces: int) -> "Batch":
        """Each row cut into `pieces` rows of equal length; a remainder is dropped."""
        length = self.tokens.shape[1] // pieces
        return Batch(*(a[:, : pieces * length].reshape(-1, length) for a in self))
