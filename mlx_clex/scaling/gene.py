"""GeNE: slow pairs stretched by the scale, fast kept."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import mlx.core as mx
import numpy as np

from ..errors import InputError
from .config import option
from .factor import FactorConfig, FactorReach
from .procedure import GENE, Procedure


@dataclass(frozen=True, kw_only=True)
class GeneConfig(FactorConfig):
    """The reach, the first stretched pair, and the fine-tuning of the model."""

    factor: float = option(16.0, "Longest length / trained length.")
    num_rotations: float = option(
        3.0, "Pairs with fewer turns within the trained length are stretched in full."
    )
    training_seq_len: int | None = option(
        None, "Length of the sequences of fine-tuning, tokens; none: the trained length."
    )
    gene_random_scale: bool = option(True, "Draw a scale at each step of training.")
    log_scale: bool = option(False, "Raise attention with the logarithm of the position.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_rotations > 0:
            raise InputError(f"rope_scaling.num_rotations must be > 0, got {self.num_rotations}.")
        if self.training_seq_len is not None and self.training_seq_len < 2:
            raise InputError(
                "rope_scaling.training_seq_len must be at least 2 tokens, got "
                f"{self.training_seq_len}."
            )


class GeneScaling(FactorReach):
    """The common part of `gene` and `gene-param`: everything but the periods."""

    Config: ClassVar[type] = GeneConfig
    published: ClassVar[bool] = True
    released_procedure: ClassVar[Procedure] = Procedure(scale_draw=GENE)

    def __init__(self, config: GeneConfig | None = None, **shape: Any) -> None:
        """See `Scaling`.

        Raises:
            InputError: factor < training_seq_len / L0.
        """
        super().__init__(config, **shape)
        factor, trained_at = self.config.factor, self._trained_at
        if factor < trained_at / self.trained_length:
            raise InputError(
                f"rope_scaling.factor is {factor}, but training_seq_len {trained_at} / trained "
                f"length {self.trained_length} needs at least "
                f"{trained_at / self.trained_length:g}: raise factor or lower training_seq_len."
            )

    def scale_at(self, length: int) -> float:
        """Return max(factor, ceil(length / L0)): constant up to L0 * factor, then growing.

        Without `gene_random_scale` it is the factor at every length.
        """
        if not self.config.gene_random_scale:
            return self.config.factor
        return max(self.config.factor, float(-(-length // self.trained_length)))

    @property
    def grows(self) -> bool:
        """Whether the scale follows sequences longer than `reach`."""
        return self.config.gene_random_scale

    @property
    def procedure(self) -> Procedure:
        """The procedure of GeNE; without `gene_random_scale` the scale is fixed."""
        return self.released_procedure if self.config.gene_random_scale else Procedure()

    @property
    def gain_follows(self) -> Literal["position"] | None:
        """The position of each query, under `log_scale`."""
        return "position" if self.config.log_scale else None

    def query_gain(self, positions: mx.array | None, length: int, scale: float) -> mx.array | None:
        """Return max(1, ln m / ln training_seq_len) at position m, from 1, under `log_scale`."""
        if not self.config.log_scale or positions is None:
            return None
        logarithm = mx.log(positions.astype(mx.float32) + 1)
        return mx.maximum(1.0, logarithm / math.log(self._trained_at))

    @property
    def _trained_at(self) -> int:
        """The length of the sequences in fine-tuning, in tokens."""
        return self.config.training_seq_len or self.trained_length

    def _ramp(self) -> np.ndarray:
        """Return how far each pair is stretched: 0 not at all, 1 by the whole scale, (D/2,).

        The first pair with fewer than `num_rotations` turns within L0 is stretched in full. Pairs
        before it are stretched in proportion to their index.

        Source: GeNE (Findings of ACL 2024, 249); the repository's gene/gene_rope.py.
        """
        pairs = np.arange(self.dims // 2)
        turns = self.trained_length * self._base_inv_freq() / (2 * math.pi)
        slow = turns < self.config.num_rotations
        first = int(np.argmax(slow)) if slow.any() else len(pairs)
        return np.clip(pairs / first, 0, 1) if first else np.ones(len(pairs))


class Gene(GeneScaling):
    """Leaves fast pairs nearly as trained and slows slow pairs by the scale.

    Needs fine-tuning with randomly drawn scales; it has no learned tensors. The scale never falls
    below `factor`, also for short texts. Not YaRN, whose ramp follows frequency and starts later;
    not `gene-param`.
    """

    name: ClassVar[str] = "gene"

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Source: GeNE, gene/gene_rope.py, `InverseAngularVelocity.forward`."""
        return self._base_inv_freq() * scale ** -self._ramp()


class GeneParam(GeneScaling):
    """GeNE with two learned numbers for every pair, head and layer.

    The period of a pair becomes scale^ramp * period * exp(A) + scale * B, where A
    (`base_coef`) and B (`specific_coef`) start at 0, which equals `gene`. At other values,
    scale 1 does not give the base model. Needs as many key heads as query heads.
    """

    name: ClassVar[str] = "gene-param"
    by_layer: ClassVar[bool] = True
    learned: ClassVar[tuple[str, ...]] = ("base_coef", "specific_coef")
    untrained: ClassVar[str] = "gene"

    def __init__(self, config: GeneConfig | None = None, **shape: Any) -> None:
        """See `Scaling`; `heads`, `key_heads` and `layers` are needed.

        Raises:
            InputError: as `Gene`, or key heads are grouped.
        """
        super().__init__(config, **shape)
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

    def keep_heads(self, rank: int, size: int) -> None:
        """Keep A and B of the heads of one process; see `Scaling`."""
        count = self.base_coef.shape[1] // size
        for name in self.learned:
            self[name] = self[name][:, rank * count : (rank + 1) * count]
        self.shape = replace(self.shape, heads=count, key_heads=count)

    def differentiable_inv_freq(self, scale: Any, layer: int = 0) -> mx.array:
        """Return radians per token, float32, (H, D/2), with gradients for A and B.

        Source: GeNE, gene/gene_rope.py, `InverseAngularVelocity.forward`.
        """
        stretch = mx.array(self._ramp(), mx.float32)
        periods = mx.array(1 / self._base_inv_freq(), mx.float32)
        stretched = mx.power(scale, stretch) * periods * mx.exp(self.base_coef[layer])
        return 1 / (stretched + scale * self.specific_coef[layer])

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Solve in float32 and in the order of operations of the original.

        Where the two learned terms cancel, a period is nearly 0 and its last bit decides the
        angle. In float64 the logits of a tiny checkpoint differed by 3e-3, and 1 ulp moved one by
        7e-2, so every device solves on its CPU.
        """
        with mx.stream(mx.cpu):  # a GPU rounds pow and exp in another way
            return np.array(self.differentiable_inv_freq(scale, layer))
