"""YaRN whose scale follows the length of the text."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import mlx.core as mx
import numpy as np

from .config import option
from .factor import FactorReach
from .procedure import CREAM, PLAIN_SHARE, UNIFORM, Procedure
from .yarn import YarnRange, interpolated, yarn_entry


@dataclass(frozen=True, kw_only=True)
class YarnTConfig(YarnRange):
    """The range of interpolated pairs, and the largest scale of fine-tuning."""

    factor: float = option(16.0, "Longest length / trained length.")


class YarnT(FactorReach):
    """YaRN at the scale of the text: a short text keeps the base model's frequencies.

    The scale is length / trained length in whole steps, also past the factor. Works untrained;
    fine-tuning with drawn scales helps. Unlike `yarn`, whose scale is the factor for every
    length, it loses nothing within the trained length. The gain on attention scores,
    (0.1 ln(scale) + 1)^2, is put on the queries alone, because cached keys would keep the gain of
    an older scale. Where only a part of a head is rotated, it is on all of the query.
    """

    name: ClassVar[str] = "yarn-t"
    Config: ClassVar[type] = YarnTConfig
    released_procedure: ClassVar[Procedure] = Procedure(
        scale_draw=UNIFORM, sampling=CREAM, plain_share=PLAIN_SHARE
    )

    def scale_at(self, length: int) -> float:
        """Return ceil(length / L0), at least 1; `length` in tokens."""
        return float(max(1, -(-length // self.trained_length)))

    @property
    def gain_follows(self) -> Literal["scale"]:
        """The scale."""
        return "scale"

    def query_gain(self, positions: mx.array | None, length: int, scale: float) -> Any:
        """Return (0.1 ln(scale) + 1)^2.

        Source: arXiv 2309.00071, equation 22, where queries and keys have its root each.
        """
        return (0.1 * math.log(scale) + 1.0) ** 2

    def stock_entry(self, scale: float) -> dict[str, Any]:
        """Return the entry of `yarn`."""
        return yarn_entry(scale, self.trained_length, self.config)

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """See `yarn.interpolated`."""
        return interpolated(self._base_inv_freq(), scale, self.trained_length, self.config)
