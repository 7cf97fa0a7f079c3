"""Read with a quantised KV cache in as much memory as without.

mlx-lm multiplies with quantised keys and builds all scores of a pass, (B, H, L, S): at 131,072
cached tokens and 2,048 new ones, 17 GB for Llama 3.1 8B. For decoding, that is the faster way. A
pass of more queries restores the keys and values of its layer and takes MLX's fused attention,
whose scores are never in memory.

Not covered: which caches are quantised (mlx-lm decides).
"""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

MOST_QUANTISED_QUERIES = 8  # MLX's fused attention has its own kernel for as many


def _restoring(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return mlx-lm's quantised attention, restoring keys and values for many queries."""

    @functools.wraps(stock)
    def attention(
        queries: mx.array,
        q_keys: Any,
        q_values: Any,
        scale: float,
        mask: Any,
        group_size: int = 64,
        bits: int = 8,
    ) -> mx.array:
        how: dict[str, Any] = {"group_size": group_size, "bits": bits}
        if queries.shape[-2] <= MOST_QUANTISED_QUERIES:
            return stock(queries, q_keys, q_values, scale=scale, mask=mask, **how)
        keys, values = (
            mx.dequantize(*parts, **how).astype(queries.dtype) for parts in (q_keys, q_values)
        )
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    return attention


# The model files of mlx-lm call it through this module.
base.quantized_scaled_dot_product_attention = _restoring(
    base.quantized_scaled_dot_product_attention
)
