"""The options of a conversion, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_clex.errors import InputError

PROGRAMS = ("mlx-lm", "transformers", "llama.cpp")  # they run frozen checkpoints
DTYPES = ("float16", "bfloat16", "float32")  # as in mlx_lm.convert


@dataclass(frozen=True)
class Options:
    """The options of a conversion, besides source and target.

    The fields up to `dequantize` mean the same as in `mlx_lm.convert`. The scaling's tensors stay
    float32.
    """

    quantize: bool = False
    q_group_size: int | None = None  # weights that share one quantisation scale
    q_bits: int | None = None  # per weight
    q_mode: str = "affine"
    quant_predicate: str | None = None  # a recipe of mlx_lm.convert
    dtype: str | None = None  # type of the weights that are not quantised
    dequantize: bool = False
    scaling: Mapping[str, Any] | None = None  # a rope_scaling entry to switch on
    trained_length: int | None = None  # tokens; None takes max_position_embeddings
    own_rope: str | None = None  # keep or drop the source's stretched rope; None: keep
    freeze: float | None = None  # the scale to fix
    freeze_for: str = PROGRAMS[0]

    def __post_init__(self) -> None:
        if self.quantize and self.dequantize:
            raise InputError("Choose either -q (quantize) or -d (dequantize), not both.")
        if not self.quantize and (self.q_bits or self.q_group_size or self.q_mode != "affine"):
            raise InputError("--q-bits, --q-group-size and --q-mode need -q: add it.")
        if self.quant_predicate and (not self.quantize or self.q_mode != "affine"):
            raise InputError("--quant-predicate needs -q and --q-mode affine.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.freeze is None and self.freeze_for != "mlx-lm":
            raise InputError("--for needs --freeze SCALE: add it.")
        if self.freeze_for != "mlx-lm" and self.quantize:
            raise InputError(f"--for {self.freeze_for} does not take -q: leave out -q.")
        if self.own_rope is not None and self.scaling is None:
            raise InputError("--own-rope needs --scaling NAME: add it.")
        if self.trained_length is not None and self.trained_length < 2:
            raise InputError(
                f"--trained-length must be at least 2 tokens, got {self.trained_length}."
            )

    @property
    def for_transformers(self) -> bool:
        """Whether transformers will load the result."""
        return self.freeze is not None and self.freeze_for == "transformers"

    @property
    def for_llama_cpp(self) -> bool:
        """Whether the conversion writes a .gguf file instead of a checkpoint."""
        return self.freeze is not None and self.freeze_for == "llama.cpp"
