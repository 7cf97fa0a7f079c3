"""The result of a check, and arithmetic that the checks share.

A check is a function that yields measurements.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama


@dataclass(frozen=True)
class Measurement:
    """A measured value and its bound."""

    name: str
    measured: float
    bound: float | None = None  # None: information, which cannot fail
    at_least: bool = False  # the bound is a lower bound

    @property
    def passed(self) -> bool:
        """Return whether the measurement is within the bound; False for NaN."""
        if self.bound is None:
            return True
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        if self.bound is None:
            return f"{self.measured:.3g}"
        return f"{self.measured:.2g}, at {'least' if self.at_least else 'most'} {self.bound:g}"


Check = Callable[[], Iterator[Measurement]]


def largest(difference: Any) -> float:
    """Return the largest absolute entry of an array; NaN if there is one."""
    return float(np.abs(np.array(difference, np.float64)).max())


def on_metal() -> bool:
    """Return whether MLX computes on an Apple GPU."""
    return mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available()


def random_llama(**other: int) -> Any:
    """Return a small random LLaMA with as many key heads as query heads, trained length 64."""
    settings: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 512,
        "max_position_embeddings": 64,
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**settings | other))
    model.eval()
    mx.eval(model.parameters())
    return model


def ids(rows: int, length: int, vocabulary: int = 512) -> mx.array:
    """Return token ids, (rows, length), the same on every device."""
    drawn = np.random.default_rng(0).integers(0, vocabulary, (rows, length))
    return mx.array(drawn.astype(np.int32))


def peak_of(compute: Callable[[], Any]) -> float:
    """Return the peak of MLX's memory in a computation beyond what is held before it, bytes."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compute())
    return float(mx.get_peak_memory() - before)
