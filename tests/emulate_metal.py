"""Compute as Metal does where it differs from the CPU: `pytest -p tests.emulate_metal`.

    python -m tests.emulate_metal -m mlx_clex.doctor --self-test

From the sources of MLX (mlx/fast.cpp, backend/metal/kernels/rope.metal, backend/metal/matmul.cpp):

- The gradient of `mx.fast.rope` for its frequencies raises.
- Its positions are unsigned: those below 0 become about 4e9.
- Its cosine and sine are fast ones, of an angle that is reduced to one turn in float32.
- It computes in float32 and rounds once, whatever the type of its input.
- On M5, products of float32 round their inputs to TF32, of 11 bits, unless MLX_ENABLE_TF32 is 0 at
  the first product.

Not covered: kernels, compilation, memory, and the time limit of a computation.
"""

import os
import runpy
import sys
from collections.abc import Callable
from typing import Any, cast

import mlx_clex  # isort: skip  # noqa: F401 - before mlx.core: on Linux it looks for OpenBLAS

import mlx.core as mx
import numpy as np

_WRAPPED = 2.0**32
_TURN = float(np.float32(2 * np.pi))
_PER_RADIAN = float(np.float32(1 / (2 * np.pi)))
_LOST = 13  # bits of a float32's 23 that TF32 has not


@mx.custom_function
def _without_gradient(freqs: mx.array) -> mx.array:
    return freqs * 1.0


@_without_gradient.vjp
def _raise(*_: Any) -> Any:
    raise ValueError("[RoPE::vjp] vjp for offset or frequencies not supported")


def _rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Any,
    freqs: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    """Rotate as the kernel of Metal does; the arguments are those of `mx.fast.rope`."""
    if freqs is None:
        assert base is not None
        inv_freq = mx.power(2.0, -mx.arange(dims // 2) / (dims // 2) * float(np.log2(base)))
    else:
        inv_freq = mx.reciprocal(cast(mx.array, _without_gradient(freqs.astype(mx.float32))))
    start = offset if isinstance(offset, mx.array) else mx.array(offset)
    first = start.reshape(-1, *(1,) * (x.ndim - 1)).astype(mx.float32)
    positions = first + mx.arange(x.shape[-2], dtype=mx.float32)[:, None]
    positions = mx.where(positions < 0, positions + _WRAPPED, positions)
    turns = (scale * positions * inv_freq) * _PER_RADIAN
    angles = (turns - mx.round(turns)) * _TURN
    cos, sin = mx.cos(angles), mx.sin(angles)
    rotated, rest = x[..., :dims].astype(mx.float32), x[..., dims:]
    shape = (dims // 2, 2) if traditional else (2, dims // 2)
    pairs = mx.unflatten(rotated, -1, shape)
    one, two = (
        (pairs[..., 0], pairs[..., 1]) if traditional else (pairs[..., 0, :], pairs[..., 1, :])
    )
    turned = mx.stack([one * cos - two * sin, one * sin + two * cos], -1 if traditional else -2)
    return mx.concatenate([mx.flatten(turned, -2).astype(x.dtype), rest], axis=-1)


@mx.custom_function
def _tf32(x: mx.array) -> mx.array:
    bits = mx.view(x, mx.uint32)
    half = (1 << (_LOST - 1)) - 1
    return mx.view(((bits + half + ((bits >> _LOST) & 1)) >> _LOST) << _LOST, mx.float32)


@_tf32.vjp
def _straight(primal: Any, cotangent: mx.array, output: Any) -> mx.array:
    return cotangent


def _enabled() -> bool:
    """Return the setting as MLX reads it, at the first product."""
    global _tf32_is_on
    if _tf32_is_on is None:
        _tf32_is_on = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    return _tf32_is_on


_tf32_is_on: bool | None = None


def _rounding(product: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return a product that rounds the first `count` of its arguments where they are float32."""

    def rounded(*given: Any, **other: Any) -> Any:
        if not _enabled():
            return product(*given, **other)
        new = [
            _tf32(a) if i < count and isinstance(a, mx.array) and a.dtype == mx.float32 else a
            for i, a in enumerate(given)
        ]
        return product(*new, **other)

    return rounded


def install() -> None:
    """Replace MLX's functions, for the rest of the process."""
    core: Any = mx
    core.fast.rope = _rope
    for owner, name, count in (
        (core, "matmul", 2),
        (core.array, "__matmul__", 2),
        (core, "quantized_matmul", 1),
        (core, "gather_qmm", 1),
        (core, "gather_mm", 2),
        (core.fast, "scaled_dot_product_attention", 3),
    ):
        setattr(owner, name, _rounding(getattr(owner, name), count))
    stock = core.addmm
    core.addmm = lambda c, a, b, *rest, **other: _rounding(
        lambda a, b: stock(c, a, b, *rest, **other), 2
    )(a, b)


install()

if __name__ == "__main__":
    _, flag, module, *argv = sys.argv
    assert flag == "-m"
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
