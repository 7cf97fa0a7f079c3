"""YaRN: slow pairs interpolated, fast pairs kept."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from .config import option
from .factor import FactorConfig, FactorScaling


@dataclass(frozen=True, kw_only=True)
class YarnConfig(FactorConfig):
    """The range of interpolated pairs, and the factor."""

    beta_fast: float = option(
        32.0, "Pairs with more turns within the trained length stay as trained."
    )
    beta_slow: float = option(
        1.0, "Pairs with fewer turns within the trained length are interpolated in full."
    )

    attention_factor: float | None = option(
        None, "Factor of rotated queries and keys, in place of the one that follows the scale."
    )
    mscale: float | None = option(
        None, "With --mscale-all-dim: weight of ln(scale) in that factor, as in DeepSeek."
    )
    mscale_all_dim: float | None = option(
        None, "With --mscale: weight of ln(scale) in the divisor of that factor."
    )
    truncate: bool = option(True, "Round the ends of the blended range to whole pairs.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise InputError(
                f"rope_scaling.attention_factor must be above 0, got {self.attention_factor}."
            )
        if not self.beta_fast > self.beta_slow > 0:
            raise InputError(
                "rope_scaling.beta_fast must be greater than beta_slow, and beta_slow greater "
                f"than 0, got {self.beta_fast} and {self.beta_slow}."
            )


class Yarn(FactorScaling):
    """Keeps fast pairs, slows slow pairs by the scale, blends pairs in between.

    Also raises attention scores: the rotated dimensions of queries and keys are multiplied by
    0.1 ln(scale) + 1. The paper trains it; it also works untrained. The keys `attention_factor`,
    `mscale`, `mscale_all_dim` and `truncate` mean what they mean in transformers.
    """

    name: ClassVar[str] = "yarn"
    Config: ClassVar[type] = YarnConfig
    in_transformers: ClassVar[bool] = True

    def stock_entry(self, scale: float) -> dict[str, Any]:
        """Return the entry of the same name."""
        return {
            "type": self.name,
            "factor": scale,
            "original_max_position_embeddings": self.trained_length,
            "beta_fast": self.config.beta_fast,
            "beta_slow": self.config.beta_slow,
            **self._optional(),
        }

    def _optional(self) -> dict[str, Any]:
        """Return the keys that differ from the paper."""
        names = ("attention_factor", "mscale", "mscale_all_dim")
        given = {name: getattr(self.config, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        return given if self.config.truncate else {**given, "truncate": False}

    def rotary_gain(self, scale: float) -> float:
        """Source: arXiv 2309.00071, equation 22; transformers, `_compute_yarn_parameters`."""
        config, grown = self.config, 0.1 * math.log(scale)
        gain = config.attention_factor
        if gain is None:
            gain = grown + 1.0
            if config.mscale and config.mscale_all_dim:
                gain = (config.mscale * grown + 1.0) / (config.mscale_all_dim * grown + 1.0)
        return self.shape.gain * gain

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: arXiv 2309.00071, section 3.2; bounds rounded as its code does."""
        inv_freq = self._base_inv_freq()
        low = self._pair_with_turns(self.config.beta_fast)
        high = self._pair_with_turns(self.config.beta_slow)
        if self.config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dims - 1)
        pairs = np.arange(self.dims // 2)
        # Equal bounds would divide by zero; the reference widens them by this much.
        ramp = np.clip((pairs - low) / (high - low or 0.001), 0, 1)
        return inv_freq * ((1 - ramp) + ramp / scale)

    def _pair_with_turns(self, turns: float) -> float:
        """Return the pair, counted from the fastest, with this many turns within L0 tokens."""
        # Linear interpolation of the logarithms of the frequencies, extrapolated past the ends.
        # For a plain rope this equals the formula of the paper.
        wanted = math.log(turns * 2 * math.pi / self.trained_length)
        logs = np.log(self._base_inv_freq())
        at = int(np.clip(np.searchsorted(-logs, -wanted), 1, len(logs) - 1))
        return at - 1 + (wanted - logs[at - 1]) / (logs[at] - logs[at - 1])
