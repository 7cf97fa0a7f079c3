"""Rotate queries and keys, and replace a model's rope.

The planner decides the scale once per forward pass (`planner.py`) and stores the frequencies in a
`Pass`, which every rope module of the model reads. `mx.fast.rope` is used for one frequency vector
for all heads and rows, without a gradient for it. Cosine and sine tables are used for frequencies
per head or row, given positions, and training. Their rotation has a gradient of its own, which
keeps its result and nothing else, and never needs that of `mx.fast.rope`: on the GPU the kernel
has none for frequencies.

Angles are float32: position times frequency is off by up to 1.6e-3 radians at 32k tokens, 6e-3 at
131k and 9e-2 at 1M, as in every float32 rotary embedding. Measured on a CPU; on Metal the fused
kernel uses fast sine and cosine, whose error is added.

Not covered: the scale of a pass, and keys that are already cached.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .base_rope import BaseRope

Offset = int | mx.array  # position of the first token: one for all rows, or (B,)


def rotate(
    x: mx.array,
    inv_freq: mx.array,
    offset: Offset = 0,
    *,
    traditional: bool = False,
    fused: bool = True,
) -> mx.array:
    """Rotate queries or keys at consecutive positions.

    Args:
        x: (B, H, L, head_dim), head_dim >= D; dimensions past D stay unchanged.
        inv_freq: radians per token, (D/2,), or (H, D/2) for frequencies per head.
            Negative and zero are allowed: rotations compose, so a difference of
            frequencies moves keys from one scale to another.
        offset: position of the first token, an int or one per row, (B,). Rows padded on the
            left start below 0; results at such positions have no meaning, and differ between
            devices.
        traditional: pair neighbouring dimensions instead of the two halves.
        fused: use `mx.fast.rope` where possible. It has no gradient for its frequencies on
            the GPU; pass False if you need one.

    Returns:
        An array like `x`.
    """
    if fused and inv_freq.ndim == 1:
        return _rotate_fused(x, 1 / inv_freq, offset, traditional)
    return rotate_at(x, inv_freq, positions_from(offset, x.shape[-2]), traditional=traditional)


def rotate_at(
    x: mx.array,
    inv_freq: mx.array,
    positions: mx.array,
    tables: tuple[mx.array, mx.array] | None = None,
    *,
    traditional: bool = False,
) -> mx.array:
    """Rotate queries or keys at given positions, with a gradient for `x` and `inv_freq`.

    Args:
        x: (B, H, L, head_dim), head_dim >= D; dimensions past D stay unchanged.
        inv_freq: radians per token, (D/2,), (H, D/2), or (B, H or 1, D/2).
        positions: in tokens, whole or not, (L,) or (B, L); they have no gradient.
        tables: their `cos_sin`, where it is already computed.
        traditional: pair neighbouring dimensions instead of the two halves.

    Returns:
        An array like `x`, computed in float32.
    """
    # As (B, H or 1, D/2) and (B, L), so that the gradient has one case.
    inv_freq = inv_freq.reshape(*(1,) * (3 - inv_freq.ndim), *inv_freq.shape)
    positions = positions.reshape(-1, positions.shape[-1])
    cos, sin = map(mx.stop_gradient, tables or cos_sin(positions, inv_freq))
    return _TURNS[traditional](x, inv_freq, positions, cos, sin)


def _with_gradient(traditional: bool) -> Callable[..., mx.array]:
    """Return the rotation by tables as a function with a gradient of its own."""

    @mx.custom_function
    def turn(
        x: mx.array, inv_freq: mx.array, positions: mx.array, cos: mx.array, sin: mx.array
    ) -> mx.array:
        return rotate_by(x, cos, sin, traditional=traditional)

    @turn.vjp
    def gradient(
        primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, ...]:
        _, inv_freq, positions, cos, sin = primals
        # The tables are made again, after `cotangent`: kept until here, those of gene-param are as
        # large as the keys.
        (positions,) = mx.depends([positions], [cotangent])
        back = rotate_by(cotangent, *cos_sin(positions, -inv_freq), traditional=traditional)
        # An angle moves the rotated pair (o1, o2) along (-o2, o1).
        (o1, o2), (g1, g2) = (_pairs(a, inv_freq, traditional) for a in (output, cotangent))
        slopes = _slopes(o1, o2, g1, g2, positions[:, None, :, None])
        shared = [axis for axis in (0, 1) if inv_freq.shape[axis] == 1]
        of_inv_freq = slopes.sum(axis=[*shared, 2], keepdims=True).squeeze(2)
        # Nothing else waits for this gradient: at the end of the backward pass, it would find the
        # rotated arrays and cotangents of every layer still in memory.
        (back,) = mx.depends([back], [of_inv_freq])
        return back, of_inv_freq, *map(mx.zeros_like, (positions, cos, sin))

    return cast(Callable[..., mx.array], turn)


def _pairs(x: mx.array, inv_freq: mx.array, traditional: bool) -> tuple[mx.array, mx.array]:
    """Return the first and the second dimension of every rotated pair, (B, H, L, D/2) each."""
    half = inv_freq.shape[-1]
    if traditional:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


@partial(mx.compile, shapeless=True)
def _slopes(
    o1: mx.array, o2: mx.array, g1: mx.array, g2: mx.array, positions: mx.array
) -> mx.array:
    o1, o2, g1, g2 = (a.astype(mx.float32) for a in (o1, o2, g1, g2))
    return positions * (g2 * o1 - g1 * o2)


def _rotate_fused(x: mx.array, periods: Any, offset: Offset, traditional: bool) -> mx.array:
    return mx.fast.rope(
        x,
        2 * periods.shape[-1],
        traditional=traditional,
        base=None,
        scale=1.0,
        offset=offset,
        freqs=periods,
    )


def positions_from(offset: Offset, length: int) -> mx.array:
    """Return positions from `offset` on, float32, (L,), or (B, L) for one offset per row."""
    if isinstance(offset, mx.array) and offset.ndim:
        return offset[:, None] + mx.arange(length, dtype=mx.float32)
    return offset + mx.arange(length, dtype=mx.float32)


def cos_sin(positions: mx.array, inv_freq: mx.array) -> tuple[mx.array, mx.array]:
    """Return the cosine and sine of every position and pair.

    Args:
        positions: in tokens, whole or not, (L,) or (B, L).
        inv_freq: radians per token, (D/2,), (H, D/2), or (B, H or 1, D/2).

    Returns:
        Two arrays that broadcast against (B, H, L, D/2), float32.
    """
    if positions.ndim == 2:
        positions = positions[:, None]
    if inv_freq.ndim > 1:
        inv_freq = inv_freq[..., None, :]
    return _cos_sin(positions[..., None].astype(mx.float32), inv_freq)


@partial(mx.compile, shapeless=True)
def _cos_sin(positions: mx.array, inv_freq: mx.array) -> tuple[mx.array, mx.array]:
    angles = positions * inv_freq
    return mx.cos(angles), mx.sin(angles)


def rotate_by(x: mx.array, cos: mx.array, sin: mx.array, *, traditional: bool = False) -> mx.array:
    """Rotate `x`, (B, H, L, head_dim), by given tables; computed in float32.

    The two of a pair are swapped by a view, so that one kernel reads and writes each entry once.
    """
    half = cos.shape[-1]
    axis = -1 if traditional else -2  # the axis of the two of a pair
    rotated = x if x.shape[-1] == 2 * half else x[..., : 2 * half]
    pairs = mx.unflatten(rotated, -1, (half, 2) if traditional else (2, half))
    swapped = pairs[..., ::-1] if traditional else pairs[..., ::-1, :]
    cos, sin = mx.expand_dims(cos, axis), mx.expand_dims(sin, axis)
    out = mx.flatten(_turned(pairs, swapped, cos, sin, _SIGNS[axis]), -2)
    return out if rotated is x else mx.concatenate([out, x[..., 2 * half :]], axis=-1)


_SIGNS = {-1: mx.array([-1.0, 1.0]), -2: mx.array([[-1.0], [1.0]])}  # of the sine, by `axis`


@partial(mx.compile, shapeless=True)
def _turned(
    pairs: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array, signs: mx.array
) -> mx.array:
    turned = pairs.astype(mx.float32) * cos + swapped.astype(mx.float32) * (signs * sin)
    return turned.astype(pairs.dtype)


_TURNS = {traditional: _with_gradient(traditional) for traditional in (False, True)}


@partial(mx.compile, shapeless=True)
def _times(x: mx.array, gain: mx.array) -> mx.array:
    """Multiply in float32: bfloat16 would round the gain to three digits."""
    return (x.astype(mx.float32) * gain).astype(x.dtype)


def _multiplied(x: mx.array, dims: int, gain: mx.array) -> mx.array:
    """Multiply the first `dims` dimensions by `gain`."""
    out = _times(x[..., :dims], gain)
    return out if dims == x.shape[-1] else mx.concatenate([out, x[..., dims:]], axis=-1)


def keep_still(
    rotated: mx.array, x: mx.array, dims: int, pairs: int | None, traditional: bool
) -> mx.array:
    """Restore the pairs that must not rotate: all but the fastest `pairs` of D/2."""
    if pairs is None or pairs == dims // 2:
        return rotated
    if traditional:
        return mx.concatenate([rotated[..., : 2 * pairs], x[..., 2 * pairs :]], axis=-1)
    half = dims // 2
    return mx.concatenate(
        [
            rotated[..., :pairs],
            x[..., pairs:half],
            rotated[..., half : half + pairs],
            x[..., half + pairs :],
        ],
        axis=-1,
    )


@dataclass
class Pass:
    """The rotation and gain of one forward pass, the same in every layer.

    The fused rotation uses `periods`. If it is None, the plain rotation uses `inv_freq`: a single
    array for all layers, or one for each scaled layer, in their order.
    """

    periods: mx.array | None = None  # tokens per radian, (D/2,)
    inv_freq: Sequence[mx.array] = ()  # radians per token, as `cos_sin` takes them
    positions: mx.array | None = None  # in tokens, (L,) or (B, L); None: consecutive
    rotary_gain: float = 1.0  # on the rotated dimensions of queries and keys
    # On queries: None, a number, or one per row, (B, 1, 1, 1).
    query_gain: Any = None
    # On queries: a function of positions (L,) or (B, L), in tokens.
    position_gain: Any = None
    learns: bool = True  # False: no gradient is taken
    _tables: dict[int, tuple[mx.array, mx.array, mx.array]] = field(default_factory=dict)
    _gains: mx.array | None = None  # on queries, computed in the first layer

    def forget_positions(self) -> None:
        """Drop what was computed from the positions of a pass; scale and gain stay."""
        self._tables, self._gains = {}, None

    @cached_property
    def _gain_array(self) -> mx.array:
        return mx.array(self.rotary_gain, mx.float32)

    def rotate(self, x: mx.array, offset: Offset, layer: int, traditional: bool) -> mx.array:
        """Rotate queries or keys of a layer; shapes are those of the function `rotate`."""
        if self.rotary_gain != 1.0:
            pairs = self.inv_freq[0] if self.periods is None else self.periods
            x = _multiplied(x, 2 * pairs.shape[-1], self._gain_array)
        if self.periods is not None:
            return _rotate_fused(x, self.periods, offset, traditional)
        # Queries and keys share a table, and so do all layers with the same frequencies.
        layer = min(layer, len(self.inv_freq) - 1)
        if layer not in self._tables:
            positions = self.positions
            if positions is None:
                made = next(iter(self._tables.values()), None)
                positions = made[0] if made else positions_from(offset, x.shape[-2])
            self._tables[layer] = (positions, *cos_sin(positions, self.inv_freq[layer]))
        positions, cos, sin = self._tables[layer]
        if not self.learns:
            return rotate_by(x, cos, sin, traditional=traditional)
        inv_freq = self.inv_freq[layer]
        return rotate_at(x, inv_freq, positions, (cos, sin), traditional=traditional)

    def gain(self, queries: mx.array, offset: Offset) -> mx.array:
        """Multiply rotated queries, (B, H, L, head_dim), by the gain of the pass."""
        if self._gains is None:
            self._gains = self._gains_at(offset, queries.shape[-2])
        return _times(queries, self._gains)

    def _gains_at(self, offset: Offset, length: int) -> mx.array:
        if self.position_gain is None:
            return mx.array(self.query_gain, mx.float32)
        positions = self.positions
        if positions is None:
            positions = positions_from(offset, length)
        gain = self.position_gain(positions)
        return gain[..., None] if gain.ndim == 1 else gain[:, None, :, None]

    @cached_property
    def gains(self) -> bool:
        """Whether queries have a gain."""
        return self.query_gain is not None or self.position_gain is not None

    @cached_property
    def fused_only(self) -> bool:
        """Whether one call of the fused kernel is enough."""
        return self.periods is not None and self.rotary_gain == 1.0 and not self.gains


class CurrentPass:
    """The current pass of a model, shared by the model and its rope modules."""

    def __init__(self) -> None:
        self.now: Pass | None = None
        self.count = 0  # passes begun


class Rope(nn.Module):
    """Replaces a model's rope and rotates by the current pass."""

    def __init__(
        self,
        base: BaseRope,
        layer: int,
        current: CurrentPass,
        *,
        calls: int = 2,
        query_call: int = 0,
    ) -> None:
        super().__init__()
        self.dims = base.dims
        self.traditional = base.traditional
        self.pairs = base.pairs  # number of rotated pairs, the fastest ones
        self.layer = layer  # index among the scaled layers
        self._base_rope = base
        self._all_rotate = self.pairs == self.dims // 2
        self._current = current
        self._calls = calls  # calls of this module in one pass
        self._query_call = query_call  # index of the call that rotates the queries
        self._last_count = 0
        self._called = 0

    def __call__(self, x: mx.array, offset: Offset = 0) -> mx.array:
        """Rotate queries or keys, (B, H, L, head_dim), the first at position `offset`.

        `query_call` of the constructor says which call of a pass gets the queries.
        """
        current = self._current
        now = current.now
        if now is None:
            raise RuntimeError(
                "A rope module was called outside a forward pass of its model. Call the "
                "model instead: it sets the scale once per pass."
            )
        if now.fused_only and self._all_rotate:
            # The usual case at inference, kept fast.
            return _rotate_fused(x, now.periods, offset, self.traditional)
        out = now.rotate(x, offset, self.layer, self.traditional)
        out = keep_still(out, x, self.dims, self.pairs, self.traditional)
        if now.gains:
            if self._last_count != current.count:
                self._last_count, self._called = current.count, 0
            # With gradient checkpointing, a layer makes the same calls again in the same order.
            if self._called % self._calls == self._query_call:
                out = now.gain(out, offset)
            self._called += 1
        return out

    def _extra_repr(self) -> str:
        return f"{self.dims}, base={self._base_rope.base}, traditional={self.traditional}"
