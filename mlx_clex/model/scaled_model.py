"""Puts a scaling into a stock mlx-lm model.

The model keeps its class's code: its rope modules are replaced, and its class by a
subclass made on the fly whose `__call__` decides the scale and gain of the pass, moves
cached keys that have another scale, and then runs the stock `__call__`.

Not covered: which ropes those are (`families.py`). Layers with a sliding window keep
their rope and cache; ropes that scale by themselves (llama3, longrope, ...) are refused.
"""

import contextlib
import dataclasses
import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.models.pipeline import PipelineMixin

from ..errors import InputError
from ..scaling import PREFIX, Scaling, build_scaling
from .cache import (
    Difference,
    ScaledCache,
    ScaledKVCache,
)
from .find_ropes import RotatedKeys, Site, config_value, find_sites, model_name, stock_caches
from .rotary import CurrentPass, Pass, Rope

_SCALED_CACHES = frozenset(get_args(ScaledCache))


def attach(
    model: nn.Module,
    rope_scaling: Mapping[str, Any],
    *,
    trained_length: int | None = None,
    weights: Mapping[str, mx.array] | None = None,
    scale: float | None = None,
) -> nn.Module:
    """Give a loaded mlx-lm model a scaling, in place.

    Args:
        model: any mlx-lm model with rotary attention. One that has a scaling already gets
            the new one in its place.
        rope_scaling: `{"type": "clex", "max_factor": 16}` and the like.
        trained_length: L0 in tokens; None takes max_position_embeddings of the model.
        weights: learned tensors, `scaling.up_proj` and so on; None starts afresh.
        scale: hold the model at this scale for good; None lets it follow the text. For
            linear, ntk and yarn it is a new factor.

    Returns:
        The same model. `model.scaling` is the scaling.

    Raises:
        InputError: a config, weight or scale that cannot be used, or a model that cannot
            be served: the message says what was looked for and what was found.
    """
    stock = getattr(type(model), "stock_class", type(model))
    sites = find_sites(model)
    rope = sites[0].rope
    if trained_length is None:
        trained_length = config_value(model, "max_position_embeddings")
        if trained_length is None:
            raise InputError(
                f"The config of {stock.__module__} does not say at what length the model "
                "was trained: pass trained_length, in tokens."
            )
    scaling = build_scaling(
        rope_scaling,
        dims=rope.dims,
        base=rope.base,
        trained_length=trained_length,
        weights=weights,
        heads=sites[0].heads,
        key_heads=sites[0].key_heads,
        layers=len(model.layers),
    )
    assert scaling.static or scaling.rotary_gain(2.0) == 1.0, "cached keys would keep it"
    _check_heads(model, scaling, sites)
    _check_gain(model, scaling, sites)
    if scale is not None:
        scale = scaling.check_scale(scale)
    _check_moves(model, scaling.static or scale is not None, sites)

    current = CurrentPass()
    layers = sorted({site.layer for site in sites})
    for site in sites:
        new = Rope(
            rope.dims,
            rope.base,
            site.rope.traditional,
            layers.index(site.layer),
            current,
            pairs=rope.pairs,
            calls=site.calls,
            query_call=site.query_call,
        )
        setattr(site.owner, site.name, new)
    mx.eval(scaling.parameters())
    model.scaling = scaling
    model.fixed_scale = scale
    keys = [cached for site in sites for cached in site.keys]
    stage = getattr(model, "model", None)
    model._planner = _Planner(
        scaling, scale, current, layers, keys, stage if isinstance(stage, PipelineMixin) else None
    )
    model.__class__ = _scaled_class(stock)
    return model


class ScaledModel:
    """What `attach` adds to the class of a stock model."""

    stock_class: type
    scaling: Scaling
    fixed_scale: float | None  # the scale the model is held at, or None
    layers: list[nn.Module]  # the stock model's
    _planner: "_Planner"

    @property
    def reach(self) -> int | None:
        """The longest sequence the model serves, in tokens; None where there is no end."""
        if self.fixed_scale is None or self.scaling.hard_reach:
            return self.scaling.reach
        return int(self.fixed_scale * self.scaling.trained_length)

    def scale_at(self, length: int) -> float:
        """The scale of a sequence of `length` tokens."""
        return self._planner.scale_at(length)

    def make_cache(self, expected_length: int | None = None) -> list[Any]:
        """The stock model's caches, those of scaled layers aware of their scale.

        Args:
            expected_length: tokens, counted from position 0, whose scale and gain the
                sequence has from its first token on; None: those of what has been read.
        """
        check_length(self, expected_length or 0)
        caches: Any = stock_caches(self)
        if self._planner.constant:
            return caches
        for keys in self._planner.keys_here():
            *outer, last = keys.path
            parent = caches
            for index in outer:
                caches_inside = list(parent[index].caches)
                parent[index].caches = parent = caches_inside
            parent[last] = ScaledKVCache(expected_length or 0)
        return caches

    def check_stage(self) -> None:
        """Refuse a pipeline in which a process could not tell how long the text is.

        Raises:
            InputError: none of its layers keeps keys that are scaled.
        """
        if not self._planner.keys_here():
            raise InputError(
                "A process of the pipeline would have no layer with a scaling, and not know how "
                "long the text is: start fewer of them."
            )

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The stock model's, which never sees the scaling's tensors."""
        ours = {k: v.astype(mx.float32) for k, v in weights.items() if k.startswith(PREFIX)}
        rest = {k: v for k, v in weights.items() if not k.startswith(PREFIX)}
        stock = getattr(super(), "sanitize", None)
        return (stock(rest) if stock else rest) | ours

    def set_dtype(self, *args: Any, **kwargs: Any) -> None:
        """`nn.Module.set_dtype`, of everything but the scaling's tensors."""
        ours = self.scaling.parameters()
        super().set_dtype(*args, **kwargs)  # type: ignore[misc]  # the stock model's
        self.scaling.update(ours)

    @property
    def cast_predicate(self) -> Any:
        """Keeps `mlx_lm.convert --dtype` from the scaling's tensors."""
        stock = getattr(super(), "cast_predicate", lambda _: True)
        return lambda path: not path.startswith(PREFIX) and stock(path)


def make_prompt_cache(model: nn.Module, expected_length: int | None = None) -> list[Any]:
    """Caches for a new sequence.

    Args:
        model: from `load` or `attach`; any other mlx-lm model gets its own caches.
        expected_length: how long the sequence is going to be, in tokens from position 0.
            Its scale and gain then hold from the first token on, and grow past it with
            the text: a prompt read in chunks gives what one pass over it would. None:
            scale and gain are those of what has been read so far.

    Raises:
        InputError: the expected length is beyond a hard reach.
    """
    from mlx_lm.models.cache import make_prompt_cache as stock

    if isinstance(model, ScaledModel):
        return model.make_cache(expected_length)
    return stock(model)


@contextlib.contextmanager
def given_pass(model: nn.Module, what: Pass) -> Iterator[None]:
    """Let every forward pass inside rotate as `what` says, instead of by its length.

    The door for training, where scale and positions are drawn: frequencies and positions
    come in as arrays, so that gradients reach them and a compiled step takes any. It
    closes behind itself, so no array of a traced step outlives it.

    Args:
        model: from `load` or `attach`.
        what: the pass; its gains are taken as they are.
    """
    planner = model._planner
    planner.given = what
    try:
        yield
    finally:
        planner.given = None


def check_length(model: Any, length: int) -> None:
    """Refuse a sequence that no scale of the model serves.

    Raises:
        InputError: `length`, in tokens, is beyond a hard reach.
    """
    scaling = model.scaling
    if scaling.hard_reach and length > scaling.reach:
        raise InputError(
            f"{length} tokens are beyond the reach of this model, {scaling.reach} tokens "
            f"(trained length {scaling.trained_length} x max_factor "
            f"{scaling.config.max_factor}): shorten the text, or use a checkpoint with a "
            "larger max_factor."
        )


def _check_heads(model: nn.Module, scaling: Scaling, sites: list[Site]) -> None:
    """Refuse tensors for every layer and head where layers have other numbers of heads."""
    heads = list(dict.fromkeys(site.heads for site in sites))
    if scaling.by_layer and len(heads) > 1:
        raise InputError(
            f"gene-param has a number for every layer and head, but {model_name(model)} has "
            f"layers of {heads[0]} heads and of {heads[1]} heads. Use gene instead."
        )


def _check_gain(model: nn.Module, scaling: Scaling, sites: list[Site]) -> None:
    """Refuse a gain on queries where a rope cannot give it."""
    why = next((site.ungainable for site in sites if site.ungainable), None)
    if why is not None and scaling.gain_follows is not None:
        raise InputError(
            f"log_scale multiplies queries, which {model_name(model)} does not allow: {why}. "
            "Set log_scale to false."
        )


def _check_moves(model: nn.Module, constant: bool, sites: list[Site]) -> None:
    """Refuse a scale that grows where cached keys cannot follow it."""
    why = next((site.unmovable for site in sites if site.unmovable), None)
    if why is not None and not constant:
        raise InputError(
            f"{model_name(model)} can only be held at one scale: {why}, so they cannot move "
            "to another scale. Pass scale=, or use linear, ntk or yarn."
        )


@functools.cache
def _scaled_class(stock: type) -> type:
    """The subclass of a stock model class whose passes have one scale."""
    signature = inspect.signature(stock.__call__)
    names = list(signature.parameters)[1:]
    cache_at = names.index("cache") if "cache" in names else len(names)

    # mlx-lm reads the signature, e.g. for `input_embeddings`.
    @functools.wraps(stock.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens: Any = args[0] if args else kwargs.get(names[0])
        if tokens is None or not tokens.size:
            tokens = kwargs.get("input_embeddings", tokens)
        cache = args[cache_at] if len(args) > cache_at else kwargs.get("cache")
        current = self._planner.begin(self, tokens.shape[1], cache)
        try:
            return stock.__call__(self, *args, **kwargs)
        finally:
            current.now = None

    members = {"__call__": call, "stock_class": stock, "__module__": stock.__module__}
    if hasattr(stock, "shard"):
        # mlx-lm asks whether a model has one.
        members["shard"] = _sharding(stock)
    return type(stock.__name__, (ScaledModel, stock), members)


def _sharding(stock: Any) -> Any:
    """The stock class's `shard`, and the scaling's heads with it."""

    @functools.wraps(stock.shard)
    def shard(self: Any, group: mx.distributed.Group | None = None) -> None:
        group = group or mx.distributed.init()
        stock.shard(self, group)
        self.scaling.keep_heads(group.rank(), group.size())

    return shard


def _picker(keys: list[RotatedKeys]) -> Callable[[Any], Sequence[Any]]:
    """A function from a model's caches to those of the keys, looked up anew at every pass."""
    if len(keys) > 1 and all(len(its.path) == 1 for its in keys):
        return operator.itemgetter(*(its.path[0] for its in keys))
    return lambda caches: [its.cache(caches) for its in keys]


class _Planner:
    """Decides what a pass does, and moves cached keys to its scale."""

    def __init__(
        self,
        scaling: Scaling,
        fixed_scale: float | None,
        current: CurrentPass,
        layers: list[int],
        keys: list[RotatedKeys],
        stage: PipelineMixin | None,
    ) -> None:
        self.scaling = scaling
        self.fixed_scale = fixed_scale
        self.current = current
        self.layers = layers
        self.keys = keys
        self.stage = stage  # what knows which layers a pipeline's process has
        self.span: tuple[int, int | None] = (0, None)  # those at the last pass
        self.spanned = keys
        self.pick = _picker(keys)
        self.made_for = (
            scaling.reach if fixed_scale is None else int(fixed_scale * scaling.trained_length)
        )
        self.constant = scaling.static or fixed_scale is not None
        self.warned = False
        self.given: Pass | None = None

    def scale_at(self, length: int) -> float:
        if self.fixed_scale is not None:
            return self.fixed_scale
        # A saved cache gives its scale back as float32; it must still be the same number.
        return float(np.float32(self.scaling.scale_at(length)))

    def begin(self, model: Any, new_tokens: int, caches: Sequence[Any] | None) -> CurrentPass:
        """Enter a pass of `new_tokens` tokens a row; the caches' keys move if need be."""
        if self.given is not None:
            return self._enter(self.given)
        if self.constant:
            lengths = [self._length_of_constant(new_tokens, caches)]
        elif caches is None:
            lengths = [new_tokens]
        else:
            here = self.keys_here()
            scaled = self.pick(caches)
            if not _SCALED_CACHES.issuperset(map(type, scaled)):
                self._check_caches(scaled)
            lengths = scaled[0].lengths_after(new_tokens)
        longest = max(lengths)
        if self.made_for is not None and longest > self.made_for:
            check_length(model, longest)
            self._warn_past_reach(longest)
        scales = [self.scale_at(length) for length in lengths]
        if not self.constant and caches is not None:
            for keys, cache in zip(here, scaled, strict=True):
                if cache.scales != scales:
                    cache.move_to(scales, self._difference_of(keys.layer), keys.place)
        # A pass with caches generates, also in a model that was left in training mode.
        learns = caches is None and model.training
        return self._enter(self._pass(scales, lengths, learns))

    def _enter(self, now: Pass) -> CurrentPass:
        self.current.count += 1
        self.current.now = now
        return self.current

    def keys_here(self) -> list[RotatedKeys]:
        """Where keys are cached here: in a pipeline, those of this process's layers."""
        if self.stage is not None and self.span != (self.stage.start_idx, self.stage.end_idx):
            self.span = start, end = self.stage.start_idx, self.stage.end_idx
            self.spanned = [
                dataclasses.replace(keys, path=(keys.path[0] - start, *keys.path[1:]))
                for keys in self.keys
                if start <= keys.path[0] and (end is None or keys.path[0] < end)
            ]
            self.pick = _picker(self.spanned)
        return self.spanned

    def _length_of_constant(self, new_tokens: int, caches: Sequence[Any] | None) -> int:
        """Length in tokens, for the checks alone; a batch's is not read off its array."""
        here = self.keys_here()
        offset = getattr(here[0].cache(caches), "offset", 0) if caches and here else 0
        return new_tokens + (offset if isinstance(offset, int) else 0)

    def _check_caches(self, caches: Sequence[Any]) -> None:
        for cache in caches:
            if not isinstance(cache, ScaledCache):
                kind = "A quantised cache" if isinstance(cache, QuantizedKVCache) else "The cache"
                raise InputError(
                    f"{kind} of class {type(cache).__name__} does not know the scale its keys are "
                    "rotated at: make caches with mlx_clex.make_prompt_cache(model)."
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
                "for; answers get worse from there on.",
                stacklevel=4,
            )

    def _pass(self, scales: list[float], lengths: list[int], learns: bool) -> Pass:
        scaling = self.scaling
        new = Pass()
        scale = scales[0]
        same = all(other == scale for other in scales)
        if same:
            new.rotary_gain = scaling.rotary_gain(scale)
        if same and learns and scaling.trainable_parameters():
            layers = self.layers if scaling.by_layer else [0]
            new.inv_freq = [scaling.differentiable_inv_freq(scale, i) for i in layers]
        elif same and not scaling.by_layer:
            new.periods = scaling.periods(scale)
        else:
            new.inv_freq = self._rows(scales)
        self._set_gain(new, lengths)
        return new

    def _rows(self, scales: list[float]) -> list[mx.array]:
        """Frequencies of rows or heads, for each layer or once for all."""
        layers = self.layers if self.scaling.by_layer else [0]
        if all(scale == scales[0] for scale in scales):
            return [self.scaling.inv_freq(scales[0], layer) for layer in layers]
        rows = []
        for layer in layers:
            row = mx.stack([self.scaling.inv_freq(scale, layer) for scale in scales])
            rows.append(row if row.ndim == 3 else row[:, None])
        return rows

    def _set_gain(self, new: Pass, lengths: list[int]) -> None:
        scaling = self.scaling
        if scaling.gain_follows is None:
            return
        if scaling.gain_follows == "position":
            new.position_gain = lambda positions: scaling.query_gain(positions, 0)
            return
        if self.fixed_scale is not None:
            lengths = [round(self.fixed_scale * scaling.trained_length)]
        gains = [scaling.query_gain(None, length) for length in lengths]
        if all(gain == gains[0] for gain in gains):
            new.query_gain = gains[0]
        else:
            new.query_gain = mx.array(np.array(gains, np.float32).reshape(-1, 1, 1, 1))
