"""Measure the frequencies and the gain of a model's own rope.

mlx-lm has plain ropes and stretched ropes (llama3, longrope, yarn, linear). A scaling starts from
the actual frequencies of the rope. They are measured by rotating unit vectors, so the class of
the rope does not matter.

Not covered: which ropes of a model are scaled (`find_ropes.py`).
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..scaling.base import plain_inv_freq

_THETA = 10_000.0  # if the config has no rope_theta
_FAR = (1, 1000, 100_003)  # positions at which the frequencies must hold, tokens


class NoVectorError(ValueError):
    """No list of frequencies describes the rope; the message says what differs."""


@dataclass(frozen=True)
class BaseRope:
    """The rotation of queries and keys by a rope."""

    dims: int  # D, rotated dimensions of a head
    base: float  # rope_theta
    traditional: bool  # pairs are neighbouring dimensions, not halves of a head
    pairs: int  # number of rotated pairs, the fastest ones; D/2 in most families
    inv_freq: tuple[float, ...] | None = None  # radians per token, (D/2,); None: plain
    gain: float = 1.0  # factor of the rotated dimensions


def measured_rope(rope: Any, width: int, rope_theta: Any) -> BaseRope:
    """Return the rotation of a rope module.

    Args:
        rope: a rope module of mlx-lm or of this project.
        width: last dimension of its input.
        rope_theta: rope_theta in the model's config, or None.

    Raises:
        NoVectorError: the rope does not rotate each pair by one constant frequency.
    """
    known = getattr(rope, "_base_rope", None)
    if isinstance(known, BaseRope):
        return known
    if isinstance(rope, nn.RoPE):
        pairs = rope.dims // 2
        if rope.scale == 1.0:
            return BaseRope(rope.dims, rope.base, rope.traditional, pairs)
        scaled = tuple((rope.scale * plain_inv_freq(rope.dims, rope.base)).tolist())
        return BaseRope(rope.dims, rope.base, rope.traditional, pairs, scaled)
    dims = getattr(rope, "dims", getattr(rope, "dim", width))
    for traditional in (False, True):
        found = _rotation(rope, width, dims, traditional)
        if found is not None:
            break
    else:
        raise NoVectorError("its pairs are neither neighbouring dimensions nor halves")
    inv_freq, gain = found
    pairs = int(np.count_nonzero(inv_freq))
    if pairs < 2 or not inv_freq[:pairs].all():
        raise NoVectorError(
            f"it rotates {pairs} of {len(inv_freq)} pairs, which are not the first ones"
        )
    inv_freq = _exactly(rope, inv_freq)
    inv_freq[pairs:] = inv_freq[pairs - 1]  # never used, and never zero
    _check_far(rope, width, dims, traditional, inv_freq[:pairs], gain)
    theta = _theta_of(inv_freq[:pairs], dims, rope_theta)
    if theta is not None and gain == 1.0:
        return BaseRope(dims, theta, traditional, pairs)
    base = float(rope_theta) if isinstance(rope_theta, int | float) else _THETA
    return BaseRope(dims, base, traditional, pairs, tuple(inv_freq.tolist()), gain)


def stands_still(rope: Any, x: mx.array) -> bool:
    """Return whether a rope does nothing; some families have one in some layers."""
    if isinstance(rope, nn.RoPE) or isinstance(getattr(rope, "_base_rope", None), BaseRope):
        return False
    return bool(mx.array_equal(rope(x, offset=1), x))


def _theta_of(inv_freq: np.ndarray, dims: int, rope_theta: Any) -> float | None:
    """Return rope_theta of a plain rope with these frequencies, or None if there is none."""
    pairs = len(inv_freq)
    theta = float(f"{float(inv_freq[-1]) ** (-dims / 2 / (pairs - 1)):.5g}")
    if isinstance(rope_theta, int | float) and math.isclose(theta, rope_theta, rel_tol=1e-4):
        theta = float(rope_theta)
    plain = plain_inv_freq(dims, theta)[:pairs]
    return theta if np.allclose(plain, inv_freq, rtol=1e-4, atol=0) else None


def _exactly(rope: Any, measured: np.ndarray) -> np.ndarray:
    """Return the module's stored frequencies if they match the measured ones."""
    kept = getattr(rope, "_freqs", None)
    if isinstance(kept, mx.array) and kept.shape == measured.shape:
        with np.errstate(divide="ignore"):
            exact = 1 / np.array(kept, np.float64)
        if np.allclose(exact, measured, rtol=1e-4, atol=1e-9):
            return exact
    return measured.copy()


def _units(width: int, dims: int, traditional: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a vector with 1 in the first dimension of each pair, and masks of both."""
    x = np.zeros(width, np.float32)
    x[slice(0, dims, 2) if traditional else slice(0, dims // 2)] = 1
    first = x.astype(bool)
    return x, first, np.roll(first, 1 if traditional else dims // 2)


def _rotated(rope: Any, x: np.ndarray, offset: int) -> np.ndarray:
    return np.array(rope(mx.array(x)[None, None, None], offset=offset), np.float64)[0, 0, 0]


def _rotation(
    rope: Any, width: int, dims: int, traditional: bool
) -> tuple[np.ndarray, float] | None:
    """Return radians per token, (D/2,), and the gain; None if pairs are formed otherwise."""
    x, first, second = _units(width, dims, traditional)
    out = _rotated(rope, x, 1)
    radius = np.hypot(out[first], out[second])
    gain = float(radius.mean())
    if not gain or not np.allclose(radius, gain, rtol=1e-3) or abs(out[~(first | second)]).any():
        return None
    gain = 1.0 if math.isclose(gain, 1.0, abs_tol=1e-6) else _gain_of(rope, gain)
    return np.arctan2(out[second], out[first]), gain


def _gain_of(rope: Any, measured: float) -> float:
    """Return the module's stored gain if it matches the measured one."""
    for name in ("mscale", "_scale"):
        kept = getattr(rope, name, None)
        if isinstance(kept, int | float) and math.isclose(kept, measured, rel_tol=1e-4):
            return float(kept)
    return measured


def _check_far(
    rope: Any, width: int, dims: int, traditional: bool, inv_freq: np.ndarray, gain: float
) -> None:
    x, first, _ = _units(width, dims, traditional)
    for offset in _FAR:
        out = _rotated(rope, x, offset)[first][: len(inv_freq)]
        if not np.allclose(out, gain * np.cos(offset * inv_freq), atol=0.1):
            raise NoVectorError(
                f"its frequencies at position {offset} differ from those at position 1"
            )
