"""Compare MLX's kernels with plain operations and float64, and measure their memory."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.rotary import rotate
from .measurement import Measurement, largest, on_metal, peak_of

_KEYS = 640  # cached tokens of `fused_attention`


def fused_attention() -> Iterator[Measurement]:
    """Compare fused attention with plain operations at several shapes and both kinds of mask."""
    types = ((mx.float32, 2e-5), (mx.float16, 4e-3), (mx.bfloat16, 3e-2))
    for dtype, bound in types:
        error = max(
            _attention_error(head_dim, length, causal, dtype)
            for head_dim in (64, 96, 128)
            for length in (1, 8, 9, 512)
            for causal in (True, False)
        )
        yield Measurement(f"fused attention, {_name(dtype)}", error, bound)


def _attention_error(head_dim: int, length: int, causal: bool, dtype: mx.Dtype) -> float:
    shapes = (1, 2, length, head_dim), (1, 1, _KEYS, head_dim), (1, 1, _KEYS, head_dim)
    q, k, v = (
        mx.random.normal(shape, key=mx.random.key(index)).astype(dtype)
        for index, shape in enumerate(shapes)
    )
    seen = mx.arange(_KEYS) <= mx.arange(_KEYS - length, _KEYS)[:, None]
    if not causal:
        seen = seen & ((mx.arange(_KEYS) % 3 != 1) | (mx.arange(_KEYS) == 0))
    scale = head_dim**-0.5
    mask: Any = "causal" if causal else seen
    fused = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    q, k, v = (array.astype(mx.float32) for array in (q, k, v))
    scores = mx.where(seen, scale * (q @ k.swapaxes(-1, -2)), -mx.inf)
    return largest(fused.astype(mx.float32) - mx.softmax(scores, axis=-1) @ v)


def rope() -> Iterator[Measurement]:
    """Compare `mx.fast.rope` with float64: how far it is off, in radians for a pair of length 1."""
    # A float32 angle is off by up to half its last digit; see model/rotary.py.
    for offset, bound in ((32_768, 5e-3), (131_072, 2e-2), (1 << 20, 2e-1)):
        error = _rope_error(offset, dims=64, traditional=False)
        yield Measurement(f"rope at {offset:,}", error, bound)
    rows = mx.array([0, 7, -3])
    for traditional in (False, True):
        for dims in (64, 32):
            name = f"rope, {dims} of 64 dims, {'neighbours' if traditional else 'halves'}"
            yield Measurement(name, _rope_error(rows, dims=dims, traditional=traditional), 1e-3)


def _rope_error(offset: int | mx.array, *, dims: int, traditional: bool) -> float:
    length = 16
    inv_freq = mx.array(10_000.0 ** -(np.arange(0, dims, 2) / dims), mx.float32)
    x = np.random.default_rng(0).choice([-1.0, 1.0], (3, 2, length, 64)) * 0.5**0.5
    turned = np.array(rotate(mx.array(x, mx.float32), inv_freq, offset, traditional=traditional))
    positions = np.array(offset, np.int64).reshape(-1, 1) + np.arange(length)
    angles = positions[:, None, :, None] * np.array(inv_freq, np.float64)
    cos, sin, expected = np.cos(angles), np.sin(angles), x.copy()
    half = dims // 2
    one = np.s_[..., 0:dims:2] if traditional else np.s_[..., :half]
    two = np.s_[..., 1:dims:2] if traditional else np.s_[..., half:dims]
    expected[one] = x[one] * cos - x[two] * sin
    expected[two] = x[one] * sin + x[two] * cos
    # Positions below 0 are padding.
    real = np.broadcast_to((positions >= 0)[:, None, :, None], x.shape)
    return largest((turned - expected)[real])


def cross_entropy() -> Iterator[Measurement]:
    """Compare the gradient of the cross-entropy with float64."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((16, 8192))).astype(np.float32)
    targets = rng.integers(0, 8192, 16)

    def loss(x: mx.array) -> mx.array:
        return nn.losses.cross_entropy(x, mx.array(targets), reduction="sum")

    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=-1, keepdims=True)
    exact[np.arange(16), targets] -= 1
    error = largest(np.array(mx.grad(loss)(mx.array(logits))) - exact)
    yield Measurement("cross-entropy's gradient", error, 1e-5)


def attention_memory() -> Iterator[Measurement]:
    """Measure the memory of attention's backward pass when the sequence doubles.

    On Metal MLX computes it in blocks, so memory doubles. Elsewhere it has all scores in memory,
    which quadruple; there the figures are of shorter sequences, and information.
    """
    lengths = (4096, 8192) if on_metal() else (512, 1024)
    peaks = [peak_of(partial(_attention_gradients, n)) for n in lengths]
    for length, peak in zip(lengths, peaks, strict=True):
        yield Measurement(f"attention backward at {length:,}, MB", peak / 1e6)
    bound = 2.5 if on_metal() else None
    yield Measurement("attention backward, twice as long", peaks[1] / peaks[0], bound)


def _attention_gradients(length: int) -> Any:
    q, k, v = (
        mx.random.normal((1, 2, length, 64), key=mx.random.key(index)).astype(mx.bfloat16)
        for index in range(3)
    )
    mx.eval(q, k, v)

    def total(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal")
        return out.astype(mx.float32).sum()

    return mx.grad(total, argnums=(0, 1, 2))(q, k, v)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
