"""Decide scale and gain of each forward pass, and rotate cached keys to the scale.

Not covered: the pass itself (`scaled_model.py`) and how keys are rotated (`cache.py`).
"""

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import QuantizedKVCache

from ..errors import InputError
from ..scaling import Scaling
from .cache import Difference, ScaledCache
from .find_ropes import RotatedKeys
from .rotary import CurrentPass, Pass

_SCALED_CACHES = frozenset(get_args(ScaledCache))


def beyond_reach(scaling: Scaling, length: int, what: str = "The sequence") -> InputError:
    """Return the error for a sequence longer than a hard reach.

    Args:
        scaling: scaling of the model.
        length: length of the sequence, tokens.
        what: start of the message.
    """
    return InputError(
        f"{what} has {length} tokens, and this model reaches {scaling.reach} "
        f"({scaling.reach_reason}), including the generated text. Shorten the text, or use a "
        "model with a longer reach."
    )


def _picker(keys: list[RotatedKeys]) -> Callable[[Any], Sequence[Any]]:
    """Return a function that picks the caches of `keys` from all caches of a model."""
    if len(keys) > 1 and all(len(its.path) == 1 for its in keys):
        return operator.itemgetter(*(its.path[0] for its in keys))
    return lambda caches: [its.cache(caches) for its in keys]


class Planner:
    """Decides scale and gain of a pass, and rotates cached keys to its scale."""

    def __init__(
        self,
        scaling: Scaling,
        fixed_scale: float | None,
        current: CurrentPass,
        layers: list[int],
        keys: list[RotatedKeys],
    ) -> None:
        self.scaling = scaling
        self.fixed_scale = fixed_scale
        self.current = current
        self.layers = layers
        self.keys = keys  # cached keys; in a pipeline, only of this process's layers
        self.pick = _picker(keys)
        # Sequences longer than this get worse answers or are refused.
        self.made_for = None if scaling.grows else scaling.reach
        if fixed_scale is not None:
            self.made_for = int(fixed_scale * scaling.trained_length)
        self.constant = scaling.static or fixed_scale is not None
        self.warned = False
        self.given: Pass | None = None
        self._kept: tuple[Any, Pass] | None = None  # what the last pass depends on, and the pass

    def scale_at(self, length: int) -> float:
        if self.fixed_scale is not None:
            return self.fixed_scale
        # A saved cache stores its scale as float32, so scales are compared in float32.
        return float(np.float32(self.scaling.scale_at(length)))

    def begin(self, model: Any, new_tokens: int, caches: Sequence[Any] | None) -> CurrentPass:
        """Begin a pass of `new_tokens` tokens per row; rotate cached keys if the scale changes."""
        if self.given is not None:
            return self._enter(self.given)
        if self.constant:
            lengths = [self._length_of_constant(new_tokens, caches)]
        elif caches is None:
            lengths = [new_tokens]
        else:
            scaled = self.pick(caches)
            if not _SCALED_CACHES.issuperset(map(type, scaled)):
                self._check_caches(scaled)
            lengths = scaled[0].lengths_after(new_tokens)
        longest = max(lengths)
        if self.made_for is not None and longest > self.made_for:
            if self.scaling.hard_reach and longest > (self.scaling.reach or 0):
                raise beyond_reach(self.scaling, longest)
            self._warn_past_reach(longest)
        scales = [self.scale_at(length) for length in lengths]
        if not self.constant and caches is not None:
            for keys, cache in zip(self.keys, scaled, strict=True):
                if cache.scales != scales:
                    cache.move_to(scales, self._difference_of(keys.layer), keys.place)
        # A pass with caches generates text, even if the model is in training mode.
        learns = caches is None and model.training
        # The frequencies of rows are lazy, so they belong to the streams of this thread.
        if learns or any(scale != scales[0] for scale in scales):
            return self._enter(self._pass(scales, lengths, learns))
        by_length = self.scaling.gain_follows == "length" and self.fixed_scale is None
        depends_on = (self.scaling.use_current_weights(), scales, by_length and lengths)
        if self._kept is None or self._kept[0] != depends_on:
            self._kept = depends_on, self._pass(scales, lengths, learns=False)
        return self._enter(self._kept[1])

    def go_on(self) -> None:
        """Begin another part of the same pass: the scale and gain stay, the positions move on."""
        assert self.current.now is not None
        self.current.now.forget_positions()
        self._enter(self.current.now)

    def end(self) -> None:
        """End the pass; nothing of the size of its text is kept."""
        if self.current.now is not None and self.current.now is not self.given:
            self.current.now.forget_positions()
        self.current.now = None

    @property
    def heads(self) -> int:
        """Query heads of a layer, at least 1."""
        return self.scaling.shape.heads or 1

    def cached(self, caches: Sequence[Any]) -> int:
        """Return how many tokens are cached; in a batch, with the padding of its rows."""
        if not self.keys:
            return 0
        cache: Any = self.keys[0].cache(caches)
        end = getattr(cache, "_idx", cache.offset)  # a batch's offset is an array
        return end if isinstance(end, int) else 0

    def _enter(self, now: Pass) -> CurrentPass:
        self.current.count += 1
        self.current.now = now
        return self.current

    def keep_layers(self, start: int, end: int | None) -> None:
        """Keep only the caches of these layers, numbered from `start`, for a pipeline."""
        self.keys = [
            replace(keys, path=(keys.path[0] - start, *keys.path[1:]))
            for keys in self.keys
            if start <= keys.path[0] and (end is None or keys.path[0] < end)
        ]
        self.pick = _picker(self.keys)

    def _length_of_constant(self, new_tokens: int, caches: Sequence[Any] | None) -> int:
        """Return the length for the checks.

        The lengths of a batch are read only where one may be beyond a hard reach, because that
        waits for the device.
        """
        cache: Any = self.keys[0].cache(caches) if caches and self.keys else None
        offset: Any = getattr(cache, "offset", 0)
        if not isinstance(offset, mx.array):
            return new_tokens + int(offset)
        if not self.scaling.hard_reach or cache._idx + new_tokens <= (self.scaling.reach or 0):
            return new_tokens
        padding = cache._right_padding
        rows: Any = offset + new_tokens - (0 if padding is None else padding)
        return int(rows.max().item())

    def _check_caches(self, caches: Sequence[Any]) -> None:
        for cache in caches:
            if not isinstance(cache, ScaledCache):
                kind = "A quantised cache" if isinstance(cache, QuantizedKVCache) else "The cache"
                raise InputError(
                    f"{kind} of class {type(cache).__name__} does not store the scale of its keys. "
                    "Make caches with mlx_clex.make_prompt_cache(model)."
                )

    def _difference_of(self, layer: int) -> Difference:
        def difference(old: float, new: float) -> mx.array:
            return self.scaling.inv_freq(new, layer) - self.scaling.inv_freq(old, layer)

        return difference

    def _warn_past_reach(self, length: int) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{length} tokens are past the {self.made_for} that this model's scaling is made "
                "for; answers get worse.",
                stacklevel=4,
            )

    def _pass(self, scales: list[float], lengths: list[int], learns: bool) -> Pass:
        scaling = self.scaling
        new = Pass(learns=learns)
        scale = scales[0]
        same = all(other == scale for other in scales)
        new.rotary_gain = scaling.rotary_gain(scale)  # if rows have other scales, it is constant
        if same and learns and scaling.trainable_parameters():
            new.inv_freq = self.differentiable(scale)
        elif same and not scaling.by_layer:
            new.periods = scaling.periods(scale)
        else:
            new.inv_freq = self._rows(scales)
        self._set_gain(new, lengths, scales)
        return new

    def differentiable(self, scale: Any) -> list[mx.array]:
        """Return the frequencies with their gradient, one array per layer or one for all.

        Args:
            scale: a number, or an array of one.
        """
        inv_freq = self.scaling.differentiable_inv_freq
        return [inv_freq(scale, layer) for layer in self.distinct_layers]

    @property
    def distinct_layers(self) -> list[int]:
        """The scaled layers that have frequencies of their own; 0 alone where all share them."""
        return self.layers if self.scaling.by_layer else [0]

    def _rows(self, scales: list[float]) -> list[mx.array]:
        """Return the frequencies of rows or heads, one array per layer or one for all."""
        layers = self.distinct_layers
        if all(scale == scales[0] for scale in scales):
            return [self.scaling.inv_freq(scales[0], layer) for layer in layers]
        rows = []
        for layer in layers:
            row = mx.stack([self.scaling.inv_freq(scale, layer) for scale in scales])
            rows.append(row if row.ndim == 3 else row[:, None])
        return rows

    def _set_gain(self, new: Pass, lengths: list[int], scales: list[float]) -> None:
        scaling = self.scaling
        if scaling.gain_follows is None:
            return
        if scaling.gain_follows == "position":
            new.position_gain = lambda positions: scaling.query_gain(positions, 0, 1.0)
            return
        if self.fixed_scale is not None:
            lengths = [round(self.fixed_scale * scaling.trained_length)]
        gains = [
            scaling.query_gain(None, length, scale)
            for length, scale in zip(lengths, scales, strict=True)
        ]
        if all(gain == gains[0] for gain in gains):
            new.query_gain = gains[0]
        else:
            new.query_gain = mx.array(np.array(gains, np.float32).reshape(-1, 1, 1, 1))


@contextmanager
def given_pass(model: Any, what: Pass) -> Iterator[None]:
    """Use `what` for every forward pass inside the block, instead of the length of the text.

    Training draws scale and positions, and passes frequencies and positions as arrays, so that
    gradients reach them and one compiled step serves all values. At the end of the block the pass
    is removed, so that no array of a traced step remains.

    Args:
        model: a model from `load` or `attach`.
        what: the pass; its gains are used unchanged.
    """
    planner = model._planner
    planner.given = what
    try:
        yield
    finally:
        planner.given = None
