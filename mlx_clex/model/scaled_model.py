"""Puts a scaling into a stock mlx-lm model.

The model keeps its class's code: its rope modules are replaced, and its class by a
subclass made on the fly whose `__call__` decides the scale and gain of the pass, moves
cached keys that have another scale, and then runs the stock `__call__`.

Not covered: which ropes those are (`find_ropes.py`). Layers with a sliding window keep
their rope and cache; ropes that scale by themselves (llama3, longrope, ...) are refused.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.pipeline import PipelineMixin

from ..errors import InputError
from ..scaling import PREFIX, SCALINGS, Scaling, build_scaling
from .cache import ScaledKVCache
from .find_ropes import Site, find_sites
from .planner import Planner, beyond_reach
from .rotary import CurrentPass, Pass, Rope
from .stock import config_value, model_name, stock_caches, stock_class


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
    stock = stock_class(model)
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
        inv_freq=rope.inv_freq,
        gain=rope.gain,
        trained_length=trained_length,
        weights=weights,
        heads=sites[0].heads,
        key_heads=sites[0].key_heads,
        layers=len(model.layers),
    )
    one = scaling.rotary_gain(1.0)
    assert scaling.static or scaling.rotary_gain(2.0) == one, "cached keys would keep it"
    _check_heads(model, scaling, sites)
    _check_gain(model, scaling, sites)
    if scale is not None:
        scale = scaling.check_scale(scale)
    _check_moves(model, scaling.static or scale is not None, sites)

    current = CurrentPass()
    layers = sorted({site.layer for site in sites})
    for site in sites:
        new = Rope(
            site.rope,
            layers.index(site.layer),
            current,
            calls=site.calls,
            query_call=site.query_call,
        )
        setattr(site.owner, site.name, new)
    mx.eval(scaling.parameters())
    model.scaling = scaling
    model.fixed_scale = scale
    keys = [cached for site in sites for cached in site.keys]
    model._planner = Planner(scaling, scale, current, layers, keys)
    model.__class__ = _scaled_class(stock)
    if isinstance(getattr(model, "model", None), PipelineMixin):
        _follow_pipeline(model.model, model._planner)
    return model


class ScaledModel:
    """What `attach` adds to the class of a stock model."""

    stock_class: type
    scaling: Scaling
    fixed_scale: float | None  # the scale the model is held at, or None
    layers: list[nn.Module]  # the stock model's
    _planner: Planner

    @property
    def trained_length(self) -> int:
        """L0, the length the base model was trained at, in tokens."""
        return self.scaling.trained_length

    @property
    def reach(self) -> int | None:
        """The longest sequence the model is made for, in tokens; None: any length."""
        if self.fixed_scale is None or self.scaling.hard_reach:
            return self.scaling.reach
        return int(self.fixed_scale * self.scaling.trained_length)

    @property
    def limit(self) -> int | None:
        """The longest sequence the model accepts, in tokens; None: there is no end."""
        return self.scaling.reach if self.scaling.hard_reach else None

    def check_length(self, length: int, what: str = "The sequence") -> None:
        """Refuse a sequence that the model does not accept.

        Args:
            length: tokens.
            what: the beginning of the message.

        Raises:
            InputError: `length` is beyond `limit`.
        """
        if self.limit is not None and length > self.limit:
            raise beyond_reach(self.scaling, length, what)

    def room_after(self, length: int, what: str = "The sequence") -> int | None:
        """Return how many tokens may follow `length` tokens, at least 1; None: any number.

        Raises:
            InputError: none may.
        """
        if self.limit is None:
            return None
        if length >= self.limit:
            raise beyond_reach(self.scaling, length, what)
        return self.limit - length

    def scale_at(self, length: int) -> float:
        """The scale of a sequence of `length` tokens."""
        return self._planner.scale_at(length)

    def make_cache(self, expected_length: int | None = None) -> list[Any]:
        """The stock model's caches, those of scaled layers aware of their scale.

        Args:
            expected_length: tokens, counted from position 0, whose scale and gain the
                sequence has from its first token on; None: those of what has been read.
        """
        self.check_length(expected_length or 0)
        caches: Any = stock_caches(self)
        if self._planner.constant:
            return caches
        for keys in self._planner.keys:
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
        if not self._planner.keys:
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


class UnscaledModel:
    """What `ScaledModel` answers, for a model without a scaling."""

    scaling: Scaling | None = None
    fixed_scale: float | None = None
    limit: int | None = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def trained_length(self) -> int | None:
        """The length in the model's config, in tokens, or None."""
        return config_value(self._model, "max_position_embeddings")

    @property
    def reach(self) -> int | None:
        """The trained length, or None where the config does not have it."""
        return self.trained_length

    def scale_at(self, length: int) -> float:
        """1, whatever the length."""
        return 1.0

    def make_cache(self, expected_length: int | None = None) -> list[Any]:
        """The model's own caches."""
        return mlx_lm_cache.make_prompt_cache(self._model)

    def check_length(self, length: int, what: str = "The sequence") -> None:
        """Accept every length."""

    def room_after(self, length: int, what: str = "The sequence") -> int | None:
        """None: any number of tokens may follow."""
        return None


def scaled(model: nn.Module) -> ScaledModel | UnscaledModel:
    """Return the model where it has a scaling, else a view of it that answers the same."""
    return model if isinstance(model, ScaledModel) else UnscaledModel(model)


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
    return scaled(model).make_cache(expected_length)


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


def _check_heads(model: nn.Module, scaling: Scaling, sites: list[Site]) -> None:
    """Refuse tensors for every layer and head where layers have other numbers of heads."""
    heads = list(dict.fromkeys(site.heads for site in sites))
    if scaling.by_layer and len(heads) > 1:
        raise InputError(
            f"{scaling.name} has a number for every layer and head, but {model_name(model)} has "
            f"layers of {heads[0]} heads and of {heads[1]} heads. Use another method, such as "
            f"{scaling.untrained}."
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
            f"to another scale. Pass scale=, or use one of: {', '.join(_static_methods())}."
        )


def _static_methods() -> list[str]:
    return [name for name, method in SCALINGS.items() if method.static and method.options_for(2)]


def _follow_pipeline(body: Any, planner: Planner) -> None:
    """Have the body tell the planner which layers this process keeps."""
    kind = type(body)

    def pipeline(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.pipeline(self, *args, **kwargs)
        planner.keep_layers(self.start_idx, self.end_idx)

    body.__class__ = type(kind.__name__, (kind,), {"pipeline": pipeline})


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
