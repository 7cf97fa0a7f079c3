"""YaRN: slow pairs interpolated, fast pairs kept."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from .config import option
from .factor import FactorConfig, FactorScaling


@dataclass(frozen=True, kw_only=True)
class YarnRange(FactorConfig):
    """The range of interpolated pairs, and the factor."""

    beta_fast: float = option(
        32.0, "Pairs with more turns within the trained length stay as trained."
    )
    beta_slow: float = option(
        1.0, "Pairs with fewer turns within the trained length are interpolated in full."
    )
    truncate: bool = option(True, "Round the ends of the blended range to whole pairs.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta_fast > self.beta_slow > 0:
            raise InputError(
                "rope_scaling.beta_fast must be greater than beta_slow, and beta_slow greater "
                f"than 0, got {self.beta_fast} and {self.beta_slow}."
            )


@dataclass(frozen=True, kw_only=True)
class YarnConfig(YarnRange):
    """The range, the factor, and how strongly attention scores are raised."""

    attention_factor: float | None = option(
        None, "Factor of rotated queries and keys, in place of the one that follows the scale."
    )
    mscale: float | None = option(
        None, "With --mscale-all-dim: weight of ln(scale) in that factor, as in DeepSeek."
    )
    mscale_all_dim: float | None = option(
        None, "With --mscale: weight of ln(scale) in the divisor of that factor."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise InputError(
                f"rope_scaling.attention_factor must be above 0, got {self.attention_factor}."
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
        names = ("attention_factor", "mscale", "mscale_all_dim")
        given = {name: getattr(self.config, name) for name in names}
        return yarn_entry(scale, self.trained_length, self.config) | {
            name: value for name, value in given.items() if value is not None
        }

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
        """See `interpolated`."""
        return interpolated(self._base_inv_freq(), scale, self.trained_length, self.config)


def yarn_entry(scale: float, trained_length: int, config: YarnRange) -> dict[str, Any]:
    """Return the entry of mlx-lm and transformers for one scale.

    Args:
        scale: target length / trained length.
        trained_length: L0, tokens.
        config: the range of pairs that are interpolated in part.
    """
    entry = {
        "type": "yarn",
        "factor": scale,
        "original_max_position_embeddings": trained_length,
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
    }
    return entry if config.truncate else {**entry, "truncate": False}


def interpolated(
    inv_freq: np.ndarray, scale: float, trained_length: int, config: YarnRange
) -> np.ndarray:
    """Return YaRN's frequencies, radians per token, (D/2,).

    Args:
        inv_freq: the base model's frequencies, radians per token, (D/2,).
        scale: target length / trained length.
        trained_length: L0, tokens.
        config: the range of pairs that are interpolated in part.

    Source: arXiv 2309.00071, section 3.2; bounds rounded as its code does.
    """
    pairs = np.arange(len(inv_freq))
    fast, slow = (
        _pair_with_turns(inv_freq, turns, trained_length)
        for turns in (config.beta_fast, config.beta_slow)
    )
    if config.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    low, high = max(fast, 0), min(slow, 2 * len(pairs) - 1)
    # Equal bounds would divide by zero; the reference widens them by this much.
    ramp = np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    return inv_freq * ((1 - ramp) + ramp / scale)


def _pair_with_turns(inv_freq: np.ndarray, turns: float, trained_length: int) -> float:
    """Return the pair, counted from the fastest, with this many turns within L0 tokens."""
    # Linear interpolation of the logarithms of the frequencies, extrapolated past the ends.
    # For a plain rope this equals the formula of the paper.
    wanted = math.log(turns * 2 * math.pi / trained_length)
    logs = np.log(inv_freq)
    at = int(np.clip(np.searchsorted(-logs, -wanted), 1, len(logs) - 1))
    return at - 1 + (wanted - logs[at - 1]) / (logs[at] - logs[at - 1])
