"""Attach a scaling to a stock mlx-lm model.

The model keeps the code of its class. Its rope modules are replaced, and its class becomes a
subclass whose `__call__` decides the scale and gain of the pass, rotates cached keys that have
another scale, and then runs the stock `__call__`.

Not covered: finding the ropes (`find_ropes.py`). Layers with a sliding window keep their rope and
cache.
"""

import functools
import inspect
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.pipeline import PipelineMixin

from ..errors import InputError
from ..scaling import PREFIX, SCALINGS, Scaling, build_scaling
from . import quantised_attention  # noqa: F401 - replaces a function of mlx-lm
from .cache import ScaledKVCache
from .find_ropes import Site, find_sites
from .own_rope import check_trained_length, length_of, own_rope_settled
from .parts import FEWEST, read_in_parts
from .planner import Planner, beyond_reach
from .rotary import CurrentPass, Rope
from .stock import check_model, config_of, model_name, stock_caches, stock_class


def attach(
    model: nn.Module,
    rope_scaling: Mapping[str, Any],
    *,
    trained_length: int | None = None,
    weights: Mapping[str, mx.array] | None = None,
    scale: float | None = None,
    own_rope: str | None = None,
) -> nn.Module:
    """Give a loaded mlx-lm model a scaling, in place.

    Args:
        model: any mlx-lm model with rotary attention. If it has a scaling, the new one
            replaces it.
        rope_scaling: an entry such as `{"type": "clex", "max_factor": 16}`.
        trained_length: L0 in tokens; None takes the length that the model's rope was made for.
        weights: the learned tensors, such as `scaling.up_proj`; None: untrained.
        scale: a fixed scale; None: the scale follows the length of the text. For linear,
            ntk and yarn it is a new factor.
        own_rope: what to do with a rope that the model brings stretched. keep (the default):
            it is the base. drop: a plain rope is, trained at the length before stretching;
            short texts change, and training is needed.

    Returns:
        The same model. `model.scaling` is the scaling.

    Raises:
        InputError: a config, weight or scale cannot be used, or the model has no rope that
            a scaling can replace; the message says what was found.
    """
    check_model(model)
    if own_rope != "drop":
        check_trained_length(config_of(model), trained_length)
    with own_rope_settled(model, own_rope) as length:
        if trained_length is not None:
            length = trained_length
        scaling, sites = _fit(model, rope_scaling, length, weights, scale)
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
    model.fixed_scale = None if scale is None else float(scale)
    keys = [cached for site in sites for cached in site.keys]
    model._planner = Planner(scaling, scale, current, layers, keys)
    model.__class__ = _scaled_class(stock_class(model))
    if isinstance(getattr(model, "model", None), PipelineMixin):
        _follow_pipeline(model.model, model._planner)
    return model


class ScaledModel:
    """The methods that `attach` adds to the class of a stock model."""

    stock_class: type
    scaling: Scaling
    fixed_scale: float | None  # the fixed scale, or None
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
        """The longest sequence the model accepts, in tokens; None: any length."""
        return self.scaling.reach if self.scaling.hard_reach else None

    def check_length(self, length: int, what: str = "The sequence") -> None:
        """Refuse a sequence that the model does not accept.

        Args:
            length: length of the sequence, tokens.
            what: start of the message.

        Raises:
            InputError: `length` is beyond `limit`.
        """
        if self.limit is not None and length > self.limit:
            raise beyond_reach(self.scaling, length, what)

    def room_after(self, length: int, what: str = "The sequence") -> int | None:
        """Return how many tokens may follow `length` tokens, at least 1; None: any number.

        Raises:
            InputError: `length` has reached `limit`.
        """
        if self.limit is None:
            return None
        if length >= self.limit:
            raise beyond_reach(self.scaling, length, what)
        return self.limit - length

    def scale_at(self, length: int) -> float:
        """Return the scale of a sequence of `length` tokens."""
        return self._planner.scale_at(length)

    def make_cache(self, expected_length: int | None = None) -> list[Any]:
        """Return the stock model's caches; caches of scaled layers store their scale.

        Args:
            expected_length: length that sets scale and gain from the first token on, tokens
                counted from position 0; None: the length read so far sets them.
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
        """Refuse a pipeline in which this process cannot know the length of the text.

        Raises:
            InputError: no layer of this process caches scaled keys.
        """
        if not self._planner.keys:
            raise InputError(
                "A process of the pipeline has no layer with a scaling, so it does not know the "
                "length of the text. Start fewer processes."
            )

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the weights after the stock `sanitize`, which skips the scaling's tensors."""
        ours = {k: v.astype(mx.float32) for k, v in weights.items() if k.startswith(PREFIX)}
        rest = {k: v for k, v in weights.items() if not k.startswith(PREFIX)}
        stock = getattr(super(), "sanitize", None)
        return (stock(rest) if stock else rest) | ours

    def set_dtype(self, *args: Any, **kwargs: Any) -> None:
        """Cast all tensors except the scaling's; see `nn.Module.set_dtype`."""
        ours = self.scaling.parameters()
        super().set_dtype(*args, **kwargs)  # type: ignore[misc]  # the stock model's
        self.scaling.update(ours)

    @property
    def cast_predicate(self) -> Any:
        """A predicate that excludes the scaling's tensors from `mlx_lm.convert --dtype`."""
        stock = getattr(super(), "cast_predicate", lambda _: True)
        return lambda path: not path.startswith(PREFIX) and stock(path)


class UnscaledModel:
    """A view of a model without a scaling, with the interface of `ScaledModel`."""

    scaling: Scaling | None = None
    fixed_scale: float | None = None
    limit: int | None = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def trained_length(self) -> int | None:
        """The length in the model's config, in tokens, or None."""
        return length_of(self._model, config_of(self._model))

    @property
    def reach(self) -> int | None:
        """The trained length, or None if the config does not have it."""
        return self.trained_length

    def scale_at(self, length: int) -> float:
        """Return 1 for every length."""
        return 1.0

    def make_cache(self, expected_length: int | None = None) -> list[Any]:
        """Return the model's own caches."""
        return mlx_lm_cache.make_prompt_cache(self._model)

    def check_length(self, length: int, what: str = "The sequence") -> None:
        """Accept every length."""

    def room_after(self, length: int, what: str = "The sequence") -> int | None:
        """Return None: any number of tokens may follow."""
        return None


def scaled(model: nn.Module) -> ScaledModel | UnscaledModel:
    """Return the model if it has a scaling, else a view with the same interface."""
    check_model(model)
    return model if isinstance(model, ScaledModel) else UnscaledModel(model)


def make_prompt_cache(model: nn.Module, expected_length: int | None = None) -> list[Any]:
    """Return caches for a new sequence.

    Args:
        model: a model from `load` or `attach`; any other mlx-lm model gets its own caches.
        expected_length: length of the sequence, in tokens from position 0. It sets scale
            and gain from the first token on, so that a prompt read in chunks gives the
            result of one pass; past it they grow with the text. None: the length read so
            far sets scale and gain.

    Raises:
        InputError: the expected length is beyond a hard reach, or not a whole number.
    """
    if expected_length is not None:
        if not (isinstance(expected_length, Integral) and expected_length >= 0):
            raise InputError(
                f"expected_length must be a whole number of at least 0, got {expected_length!r}."
            )
        expected_length = int(expected_length)
    return scaled(model).make_cache(expected_length)


def _fit(
    model: nn.Module,
    rope_scaling: Mapping[str, Any],
    trained_length: int | None,
    weights: Mapping[str, mx.array] | None,
    scale: float | None,
) -> tuple[Scaling, list[Site]]:
    """Return a scaling that fits the model, and the ropes that it replaces."""
    sites = find_sites(model)
    rope = sites[0].rope
    if trained_length is None:
        raise InputError(
            f"The config of {stock_class(model).__module__} does not have the trained length "
            "(max_position_embeddings): pass trained_length, in tokens."
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
        scaling.check_scale(scale)
    _check_moves(model, scaling.static or scale is not None, sites)
    return scaling, sites


def _check_heads(model: nn.Module, scaling: Scaling, sites: list[Site]) -> None:
    """Refuse tensors per layer and head if the layers differ in their number of heads."""
    heads = list(dict.fromkeys(site.heads for site in sites))
    if scaling.by_layer and len(heads) > 1:
        raise InputError(
            f"{scaling.name} needs the same number of heads in all layers, but "
            f"{model_name(model)} has layers of {heads[0]} heads and of {heads[1]} heads. Use "
            f"another method, such as {scaling.untrained}."
        )


def _check_gain(model: nn.Module, scaling: Scaling, sites: list[Site]) -> None:
    """Refuse a gain on queries if a rope cannot apply it."""
    why = next((site.ungainable for site in sites if site.ungainable), None)
    if why is not None and scaling.gain_follows is not None:
        raise InputError(
            f"{scaling.name} multiplies queries, which {model_name(model)} does not allow: {why}. "
            "Set log_scale and log_gain to false, or use another method."
        )


def _check_moves(model: nn.Module, constant: bool, sites: list[Site]) -> None:
    """Refuse a growing scale if cached keys cannot be rotated to it."""
    why = next((site.unmovable for site in sites if site.unmovable), None)
    if why is not None and not constant:
        static = [name for name, its in SCALINGS.items() if its.static and its.options_for(2)]
        raise InputError(
            f"{model_name(model)} needs a fixed scale: {why}, so cached keys cannot be rotated "
            f"to another scale. Pass scale=, or use one of: {', '.join(static)}."
        )


def _follow_pipeline(body: Any, planner: Planner) -> None:
    """Make the body's `pipeline` tell the planner which layers this process keeps."""
    kind = type(body)

    def pipeline(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.pipeline(self, *args, **kwargs)
        planner.keep_layers(self.start_idx, self.end_idx)

    body.__class__ = type(kind.__name__, (kind,), {"pipeline": pipeline})


@functools.cache
def _scaled_class(stock: type) -> type:
    """Return a subclass of a stock model class that decides the scale of each pass."""
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
        planner = self._planner
        planner.begin(self, tokens.shape[1], cache)
        try:
            if cache is not None and tokens.shape[1] > FEWEST:
                given = dict(zip(names, args, strict=False)) | kwargs
                read = functools.partial(stock.__call__, self)
                return read_in_parts(read, given, tokens, planner)
            return stock.__call__(self, *args, **kwargs)
        finally:
            planner.end()

    members = {"__call__": call, "stock_class": stock, "__module__": stock.__module__}
    if hasattr(stock, "shard"):
        # mlx-lm checks whether a model has this method.
        members["shard"] = _sharding(stock)
    return type(stock.__name__, (ScaledModel, stock), members)


def _sharding(stock: Any) -> Any:
    """Return the stock class's `shard`, extended to the heads of the scaling."""

    @functools.wraps(stock.shard)
    def shard(self: Any, group: mx.distributed.Group | None = None) -> None:
        group = group or mx.distributed.init()
        stock.shard(self, group)
        self.scaling.keep_heads(group.rank(), group.size())

    return shard
