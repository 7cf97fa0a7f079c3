"""KV caches that store the scale of their rotated keys.

They are mlx-lm's caches with two more numbers for each row. `scale` is the scale at which the
cached keys are rotated (None without keys). `expected_length` is the length that sets scale and
gain from the first token on (0: the length read so far sets them). Before a forward pass the
planner reads the length of every row, and rotates the cached keys if the scale has changed. No
cache holds a model.

mlx-lm looks up the class of a saved cache by name in `mlx_lm.models.cache`, so importing this
module adds these classes there.

Not covered: sliding windows, whose layers keep their own rope and cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from .rotary import Offset, keep_still, rotate


@dataclass(frozen=True)
class Place:
    """The place of rotated keys in a cache, and the way they are rotated."""

    part: str = "keys"  # or "values", as in latent attention (DeepSeek V3)
    start: int = 0  # first rotated dimension
    traditional: bool = False  # pairs are neighbouring dimensions, not halves of a head
    pairs: int | None = None  # number of rotated pairs, the fastest ones; None: all

    def rotated(self, array: mx.array, inv_freq: mx.array, offset: Offset = 0) -> mx.array:
        """Return `array`, (B, H, L, any), with that part rotated; see `rotate`."""
        part = array[..., self.start :] if self.start else array
        out = rotate(part, inv_freq, offset, traditional=self.traditional)
        out = keep_still(out, part, 2 * inv_freq.shape[-1], self.pairs, self.traditional)
        if not self.start:
            return out
        return mx.concatenate([array[..., : self.start], out], axis=-1)


# (old scale, new scale) -> difference of the frequencies, radians per token,
# (D/2,) or (H, D/2).
Difference = Callable[[float, float], mx.array]


class _OneScale:
    """The common part of the caches of a single sequence."""

    keys: Any
    values: Any
    offset: int
    scales: Sequence[float | None] = (None,)  # scale of the one row
    expected_length: int = 0

    @property
    def scale(self) -> float | None:
        """The scale at which the cached keys are rotated."""
        return self.scales[0]

    @scale.setter
    def scale(self, scale: float | None) -> None:
        self.scales = [scale]

    def lengths_after(self, new_tokens: int) -> list[int]:
        """Return the length after `new_tokens` more tokens, at least the expected length."""
        return [max(self.offset + new_tokens, self.expected_length)]


class ScaledKVCache(_OneScale, KVCache):
    """A `KVCache` whose keys can be rotated to another scale."""

    def __init__(self, expected_length: int = 0) -> None:
        """Make an empty cache; `expected_length` in tokens, counted from position 0."""
        super().__init__()
        self.expected_length = expected_length

    def move_to(self, scales: Sequence[float], difference: Difference, place: Place) -> None:
        """Rotate the cached keys from their scale to the scale of the pass."""
        (scale,) = scales
        if self.scale is not None and self.scale != scale and self.offset:
            moved = place.rotated(getattr(self, place.part), difference(self.scale, scale))
            setattr(self, place.part, moved)
        self.scale = scale

    @property
    def state(self) -> tuple[Any, ...]:
        """The content of the cache, as mlx-lm saves it."""
        return self.keys, self.values, self.offset, self.scale, self.expected_length

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        self.keys, self.values, self.offset, self.scale, self.expected_length = state

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "ScaledQuantizedKVCache":
        """Return this cache, quantised."""
        stock = super().to_quantized(group_size=group_size, bits=bits)
        state = (*stock.state, self.scale, self.expected_length)
        return ScaledQuantizedKVCache.from_state(state)

    @classmethod
    def merge(cls, caches: Sequence["ScaledKVCache"]) -> "ScaledBatchKVCache":
        """Return one batch of these sequences, one row each."""
        return ScaledBatchKVCache.merge(caches)


class ScaledQuantizedKVCache(_OneScale, QuantizedKVCache):
    """A `QuantizedKVCache` whose keys can be rotated to another scale.

    Each rotation quantises the keys again, so they lose precision each time the scale changes.
    `generate --kv-bits` uses the scale of the whole length, which does not change.
    """

    group_size: int
    bits: int

    def move_to(self, scales: Sequence[float], difference: Difference, place: Place) -> None:
        """Rotate the cached keys from their scale to the scale of the pass."""
        (scale,) = scales
        if self.scale is not None and self.scale != scale and self.offset:
            how: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
            keys = mx.dequantize(*getattr(self, place.part), **how)
            keys = place.rotated(keys, difference(self.scale, scale))
            setattr(self, place.part, tuple(mx.quantize(keys, **how)))
        self.scale = scale

    @property
    def state(self) -> tuple[Any, ...]:
        """The content of the cache, as mlx-lm saves it."""
        stock = (self.keys, self.values, self.offset, self.group_size, self.bits)
        return (*stock, self.scale, self.expected_length)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        *stock, self.scale, self.expected_length = state
        self.keys, self.values, self.offset, self.group_size, self.bits = stock


class ScaledBatchKVCache(BatchKVCache):
    """A `BatchKVCache` in which each row has its own scale.

    mlx-lm keeps the padding of the rows in an array. Reading it would synchronise with the device
    at every token, so this class also keeps the padding in a list.
    """

    keys: Any
    values: Any
    offset: mx.array
    left_padding: mx.array
    _idx: int

    def __init__(self, left_padding: Sequence[int]) -> None:
        """Make an empty batch; `left_padding`: empty positions at the start of each row."""
        super().__init__(list(left_padding))
        rows = len(left_padding)
        self.padding = list(left_padding)
        self.scales: list[float | None] = [None] * rows
        self.expected_lengths = [0] * rows
        self._ends: list[int] | None = None  # ends of the rows, while they are padded on the right

    def lengths_after(self, new_tokens: int) -> list[int]:
        """Return each row's length after `new_tokens` more, at least the expected length."""
        end = self._idx + new_tokens
        ends = self._ends or [end] * len(self.padding)
        rows = zip(ends, self.padding, self.expected_lengths, strict=True)
        return [max(min(end, row_end) - pad, plan) for row_end, pad, plan in rows]

    def move_to(self, scales: Sequence[float], difference: Difference, place: Place) -> None:
        """Rotate the cached keys of the rows whose scale changes in this pass."""
        if self.keys is not None and self._idx:
            changes = [
                (old, new) if old is not None and old != new else None
                for old, new in zip(self.scales, scales, strict=True)
            ]
            if changes[0] and len(set(changes)) == 1:
                moved = self._rotated(slice(None), difference(*changes[0]), place)
                setattr(self, place.part, moved)
            else:
                for row, change in enumerate(changes):
                    if change:
                        rows = slice(row, row + 1)
                        moved = self._rotated(rows, difference(*change), place)
                        getattr(self, place.part)[rows] = moved
        self.scales = list(scales)

    def _rotated(self, rows: slice, inv_freq: mx.array, place: Place) -> mx.array:
        starts = mx.array([-pad for pad in self.padding[rows]])
        return place.rotated(getattr(self, place.part)[rows], inv_freq, starts)

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Prepare for rows of unequal length; see `BatchKVCache.prepare`."""
        super().prepare(left_padding=left_padding, lengths=lengths, right_padding=right_padding)
        if left_padding is not None:
            self.padding = [a + b for a, b in zip(self.padding, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError(
                    "prepare(right_padding=...) needs lengths=..., the tokens of each row, because "
                    "the length of a row sets its scale."
                )
            self._ends = [self._idx + length for length in lengths]

    def finalize(self) -> None:
        """Move right padding to the left, after the rows are read."""
        if self._right_padding is not None and self._ends is not None:
            self.padding = [
                pad + self._idx - end for pad, end in zip(self.padding, self._ends, strict=True)
            ]
        self._ends = None
        super().finalize()

    def filter(self, batch_indices: Any) -> None:
        """Keep only these rows, in place."""
        super().filter(batch_indices)
        keep: Any = mx.array(batch_indices).tolist()
        padding = [self.padding[row] for row in keep]
        # The stock method does the same with its array.
        self.padding = [pad - min(padding) for pad in padding]
        self.scales = [self.scales[row] for row in keep]
        self.expected_lengths = [self.expected_lengths[row] for row in keep]

    def extend(self, other: "ScaledBatchKVCache") -> None:
        """Add the rows of another batch, in place."""
        if self.keys is None and other.keys is None:
            self.padding = self.padding + other.padding
        else:
            end = max(self._idx, other._idx)
            self.padding = [pad + end - self._idx for pad in self.padding] + [
                pad + end - other._idx for pad in other.padding
            ]
        super().extend(other)
        self.scales = self.scales + other.scales
        self.expected_lengths = self.expected_lengths + other.expected_lengths

    def extract(self, idx: int) -> ScaledKVCache:
        """Return the cache of one row."""
        stock = super().extract(idx)
        state = (*stock.state, self.scales[idx], self.expected_lengths[idx])
        return ScaledKVCache.from_state(state)

    @classmethod
    def merge(cls, caches: Sequence[ScaledKVCache]) -> Self:
        """Return one batch of these sequences, one row each."""
        stock = BatchKVCache.merge(caches)
        longest = max(cache.size() for cache in caches)
        batch = cls([longest - cache.size() for cache in caches])
        batch.keys, batch.values, batch.offset, batch.left_padding, batch._idx = stock.state
        batch.scales = [cache.scale for cache in caches]
        batch.expected_lengths = [cache.expected_length for cache in caches]
        return batch

    @property
    def state(self) -> tuple[Any, ...]:
        """The content of the cache, as mlx-lm saves it."""
        stock = (self.keys, self.values, self.offset, self.left_padding, self._idx)
        return (*stock, self.padding, self.scales, self.expected_lengths)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        *stock, self.padding, self.scales, self.expected_lengths = state
        self.keys, self.values, self.offset, self.left_padding, self._idx = stock
        self._right_padding = None
        self._ends = None


ScaledCache = ScaledKVCache | ScaledQuantizedKVCache | ScaledBatchKVCache

for _cache_class in (ScaledKVCache, ScaledQuantizedKVCache, ScaledBatchKVCache):
    setattr(mlx_lm_cache, _cache_class.__name__, _cache_class)
