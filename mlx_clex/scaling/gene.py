"""GeNE: slow pairs stretched by the scale, fast kept."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..errors import InputError
from .base import RotaryShape, Scaling


@dataclass(frozen=True, kw_only=True)
class GeneConfig:
    """The longest length, where stretching begins, and how it was trained."""

    factor: float = 16.0  # longest length / trained length
    num_rotations: float = 3.0  # pairs with fewer turns within L0 are stretched in full
    training_seq_len: int | None = None  # of fine-tuning, tokens; None takes L0
    gene_random_scale: bool = True  # training draws a scale at each step
    log_scale: bool = False  # queries grow with the logarithm of their position

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise InputError(f"rope_scaling.factor must be >= 1, got {self.factor}.")
        if not self.num_rotations > 0:
            raise InputError(f"rope_scaling.num_rotations must be > 0, got {self.num_rotations}.")
        if self.training_seq_len is not None and self.training_seq_len < 2:
            raise InputError(
                "rope_scaling.training_seq_len must be at least 2 tokens, got "
                f"{self.training_seq_len}."
            )


def scale_at(config: GeneConfig, trained_length: int, length: int) -> float:
    """max(factor, ceil(length / L0)): constant up to L0 * factor, then growing."""
    return max(config.factor, float(-(-length // trained_length)))


def ramp(shape: RotaryShape, num_rotations: float) -> np.ndarray:
    """How far each pair is stretched: 0 not at all, 1 by the whole scale, (D/2,).

    The first pair with fewer than `num_rotations` turns within L0 is stretched in full,
    those before it in proportion to their index.

    Source: GeNE (Findings of ACL 2024, 249); the repository's gene/gene_rope.py.
    """
    pairs = np.arange(shape.dims // 2)
    turns = shape.trained_length * shape.base ** -(2 * pairs / shape.dims) / (2 * math.pi)
    slow = turns < num_rotations
    first = int(np.argmax(slow)) if slow.any() else len(pairs)
    return np.clip(pairs / first, 0, 1) if first else np.ones(len(pairs))


def log_gain(
    config: GeneConfig, trained_length: int, positions: mx.array | None
) -> mx.array | None:
    """max(1, ln m / ln training_seq_len) for the query at position m, from 1."""
    if not config.log_scale or positions is None:
        return None
    log_length = math.log(config.training_seq_len or trained_length)
    return mx.maximum(1.0, mx.log(positions.astype(mx.float32) + 1) / log_length)


def check(config: GeneConfig, trained_length: int) -> None:
    """Refuse a factor too small for the length of training.

    Raises:
        InputError: factor < training_seq_len / L0.
    """
    trained_at = config.training_seq_len or trained_length
    if config.factor < trained_at / trained_length:
        raise InputError(
            f"rope_scaling.factor is {config.factor}, but training_seq_len "
            f"{trained_at} / trained length {trained_length} asks for at least "
            f"{trained_at / trained_length:g}: raise factor or lower training_seq_len."
        )


class Gene(Scaling):
    """Leaves fast pairs nearly as trained and slows slow ones by the scale.

    Needs fine-tuning with randomly drawn scales; nothing of its own is learned. The
    scale never falls below `factor`, so short texts are read at it too. Not YaRN, whose
    ramp follows frequency and starts later; not `gene-param`.
    """

    Config: ClassVar[type] = GeneConfig
    gain_by_position: ClassVar[bool] = True

    def __init__(self, config: GeneConfig | None = None, **shape: Any) -> None:
        """See `Scaling`; refuses a factor below training_seq_len / L0."""
        super().__init__(config, **shape)
        check(self.config, self.trained_length)

    def scale_at(self, length: int) -> float:
        """max(factor, ceil(length / L0)), `length` in tokens."""
        return scale_at(self.config, self.trained_length, length)

    def query_gain(self, positions: mx.array | None, length: int) -> mx.array | None:
        """Under `log_scale`, one number a position, never below 1."""
        return log_gain(self.config, self.trained_length, positions)

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: GeNE, gene/gene_rope.py, `InverseAngularVelocity.forward`."""
        stretch = ramp(self.shape, self.config.num_rotations)
        return self._base_inv_freq() * scale**-stretch


class GeneParam(Scaling):
    """GeNE with two learned numbers for every pair, head and layer.

    The period of a pair becomes scale^ramp * period * exp(A) + scale * B, where A
    (`base_coef`) and B (`specific_coef`) start at 0, which is `gene`. At other values
    scale 1 is no longer the base model. Needs as many key heads as query heads.
    """

    Config: ClassVar[type] = GeneConfig
    by_layer: ClassVar[bool] = True
    gain_by_position: ClassVar[bool] = True
    learned: ClassVar[tuple[str, ...]] = ("base_coef", "specific_coef")
    untrained: ClassVar[str] = "gene"

    def __init__(self, config: GeneConfig | None = None, **shape: Any) -> None:
        """See `Scaling`; `heads`, `key_heads` and `layers` are needed.

        Raises:
            InputError: as `Gene`, or key heads are grouped.
        """
        super().__init__(config, **shape)
        check(self.config, self.trained_length)
        heads, layers = self.shape.heads, self.shape.layers
        if heads is None or layers is None:
            raise InputError(
                "gene-param has tensors for every layer and head: pass heads, key_heads and layers."
            )
        if (self.shape.key_heads or heads) != heads:
            raise InputError(
                f"gene-param gives every head frequencies of its own, so it needs as many "
                f"key heads as query heads; this model has {self.shape.key_heads} and "
                f"{heads}. Use gene instead."
            )
        self.base_coef = mx.zeros((layers, heads, self.dims // 2))
        self.specific_coef = mx.zeros((layers, heads, self.dims // 2))

    def scale_at(self, length: int) -> float:
        """max(factor, ceil(length / L0)), `length` in tokens."""
        return scale_at(self.config, self.trained_length, length)

    def query_gain(self, positions: mx.array | None, length: int) -> mx.array | None:
        """Under `log_scale`, one number a position, never below 1."""
        return log_gain(self.config, self.trained_length, positions)

    def keep_heads(self, rank: int, size: int) -> None:
        """Keep A and B of the heads of one process; see `Scaling`."""
        count = self.base_coef.shape[1] // size
        for name in self.learned:
            self[name] = self[name][:, rank * count : (rank + 1) * count]
        self.shape = replace(self.shape, heads=count, key_heads=count)

    def differentiable_inv_freq(self, scale: Any, layer: int = 0) -> mx.array:
        """Radians per token, float32, (H, D/2), with gradients for A and B.

        Source: GeNE, gene/gene_rope.py, `InverseAngularVelocity.forward`.
        """
        stretch = mx.array(ramp(self.shape, self.config.num_rotations), mx.float32)
        periods = mx.array(1 / self._base_inv_freq(), mx.float32)
        stretched = mx.power(scale, stretch) * periods * mx.exp(self.base_coef[layer])
        return 1 / (stretched + scale * self.specific_coef[layer])

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """In float32 and the order of the original.

        Where the two learned terms cancel, a period is nearly 0 and its last bit decides
        the angle: float64 was off by 3e-3 in the logits of a tiny checkpoint.
        """
        return np.array(self.differentiable_inv_freq(scale, layer))
