"""One training batch: token ids, targets and loss weights."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """B rows of L tokens with the next token of each."""

    tokens: np.ndarray  # ids, (B, L)
    targets: np.ndarray  # ids of the next tokens, (B, L)
    weights: np.ndarray  # weight of each target in the loss, float32, (B, L)

    def rows(self, part: int, parts: int) -> "Batch":
        """Return every `parts`-th row, from row number `part` on."""
        return Batch(*(a[part::parts] for a in self))

    def cut(self, pieces: int) -> "Batch":
        """Cut each row into `pieces` rows of equal length; a remainder is dropped."""
        length = self.tokens.shape[1] // pieces
        return Batch(*(a[:, : pieces * length].reshape(-1, length) for a in self))
