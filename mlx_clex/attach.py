"""Puts a scaling into a stock mlx-lm model.

The model keeps its class's code: its rope modules are replaced, and its class by a
subclass made on the fly whose `__call__` decides the scale and gain of the pass, moves
cached keys that have another scale, and then runs the stock `__call__`.

Not covered: layers with a sliding window, which keep their rope and cache, and rope
modules that scale by themselves (llama3, longrope, ...), which are refused.
"""

import ast
import contextlib
import functools
import inspect
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from .cache import (
    Difference,
    ScaledBatchKVCache,
    ScaledCache,
    ScaledKVCache,
    ScaledQuantizedKVCache,
)
from .errors import InputError
from .rotary import CurrentPass, Pass, Rope
from .scaling import PREFIX, Scaling, build_scaling

ROPE = "rope"  # the attribute of an attention module


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
        model: any mlx-lm model whose attention calls `self.rope(x, offset=...)`. One that
            has a scaling already gets the new one in its place.
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
    ropes = _find_ropes(model)
    if trained_length is None:
        trained_length = getattr(model.args, "max_position_embeddings", None)
        if trained_length is None:
            raise InputError(
                f"The config of {stock.__module__} does not say at what length the model "
                "was trained: pass trained_length, in tokens."
            )
    heads = getattr(model.args, "num_attention_heads", None)
    scaling = build_scaling(
        rope_scaling,
        dims=ropes[0][3].dims,
        base=ropes[0][3].base,
        trained_length=trained_length,
        weights=weights,
        heads=heads,
        key_heads=getattr(model.args, "num_key_value_heads", heads),
        layers=len(model.layers),
    )
    if getattr(scaling.config, "log_scale", False):
        for _, attention, _, _ in ropes:
            _check_queries_first(type(attention))
    if scale is not None:
        scale = scaling.check_scale(scale)

    current = CurrentPass()
    layers = sorted({layer for layer, *_ in ropes})
    for layer, attention, name, rope in ropes:
        new = Rope(rope.dims, rope.base, rope.traditional, layers.index(layer), current)
        setattr(attention, name, new)
    mx.eval(scaling.parameters())
    model.scaling = scaling
    model.fixed_scale = scale
    model._planner = _Planner(scaling, scale, current, layers, ropes[0][3])
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
        make = getattr(super(), "make_cache", None)
        caches = make() if make else [KVCache() for _ in self.layers]
        if self._planner.constant:
            return caches
        for layer in self._planner.layers:
            caches[layer] = ScaledKVCache(expected_length or 0)
        return caches

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The stock model's, which never sees the scaling's tensors."""
        ours = {k: v.astype(mx.float32) for k, v in weights.items() if k.startswith(PREFIX)}
        rest = {k: v for k, v in weights.items() if not k.startswith(PREFIX)}
        stock = getattr(super(), "sanitize", None)
        return (stock(rest) if stock else rest) | ours

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


def _find_ropes(model: nn.Module) -> list[tuple[int, nn.Module, str, Any]]:
    """(layer, attention, attribute, rope) of every layer that can be scaled."""
    layers = getattr(model, "layers", None)
    if layers is None:
        raise InputError(f"{_name(model)} has no `layers`; attach serves mlx-lm models only.")
    kinds = _cache_kinds(model, len(layers))
    found = []
    for index, layer in enumerate(layers):
        for module in layer.modules():
            rope = module.get(ROPE)
            if rope is not None and kinds[index] is KVCache:
                found.append((index, module, ROPE, rope))
    if not found:
        inside = {
            f"{type(module).__name__}: {', '.join(module.children())}"
            for module in layers[0].modules()
            if "ttention" in type(module).__name__
        }
        raise InputError(
            f"attach looked for the attribute `{ROPE}` in the attention of {_name(model)}, "
            f"in layers with a plain KVCache, and found none (it has: "
            f"{'; '.join(sorted(inside)) or 'no attention module'}; caches: "
            f"{', '.join(sorted({kind.__name__ for kind in kinds}))})."
        )
    for _, _, _, rope in found:
        if not isinstance(rope, Rope | nn.RoPE) or getattr(rope, "scale", 1.0) != 1.0:
            raise InputError(
                f"{_name(model)} brings a rope that scales by itself "
                f"({type(rope).__name__}); two scalings would multiply. Load it without "
                "its own rope_scaling first."
            )
    if len({(rope.dims, rope.base, rope.traditional) for *_, rope in found}) > 1:
        raise InputError(
            f"The layers of {_name(model)} have ropes of different dimensions or bases; one "
            "scaling cannot serve them all."
        )
    return found


def _cache_kinds(model: nn.Module, layers: int) -> list[type]:
    """Class of each layer's stock cache."""
    stock = getattr(type(model), "stock_class", type(model))
    if not hasattr(stock, "make_cache"):
        return [KVCache] * layers
    kinds = [type(cache) for cache in stock.make_cache(model)]
    # A cache list that is not one a layer cannot be matched with layers.
    return kinds if len(kinds) == layers else [type(None)] * layers


def _name(model: nn.Module) -> str:
    stock = getattr(type(model), "stock_class", type(model))
    return f"{stock.__module__}.{stock.__qualname__}"


def _check_queries_first(attention: type) -> None:
    """Refuse a gain on queries where the first rope call does not rotate them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(attention)))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == ROPE
        and node.args
    ]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    if not calls or not ast.unparse(calls[0].args[0]).startswith("q"):
        raise InputError(
            f"log_scale multiplies queries, but {attention.__module__}."
            f"{attention.__qualname__} does not rotate them first: set log_scale to false."
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
    return type(stock.__name__, (ScaledModel, stock), members)


class _Planner:
    """Decides what a pass does, and moves cached keys to its scale."""

    def __init__(
        self,
        scaling: Scaling,
        fixed_scale: float | None,
        current: CurrentPass,
        layers: list[int],
        rope: Any,
    ) -> None:
        self.scaling = scaling
        self.fixed_scale = fixed_scale
        self.current = current
        self.layers = layers
        self.traditional = rope.traditional
        self.constant = scaling.static or fixed_scale is not None
        self.warned = False
        self.given: Pass | None = None

    def scale_at(self, length: int) -> float:
        return self.scaling.scale_at(length) if self.fixed_scale is None else self.fixed_scale

    def begin(self, model: Any, new_tokens: int, caches: Sequence[Any] | None) -> CurrentPass:
        """Enter a pass of `new_tokens` tokens a row; the caches' keys move if need be."""
        if self.given is not None:
            return self._enter(self.given)
        if self.constant:
            lengths = [self._length_of_constant(new_tokens, caches)]
        elif caches is None:
            lengths = [new_tokens]
        else:
            scaled = [self._checked(caches[layer]) for layer in self.layers]
            lengths = scaled[0].lengths_after(new_tokens)
        check_length(model, max(lengths))
        self._warn_past_reach(model, max(lengths))
        scales = [self.scale_at(length) for length in lengths]
        if not self.constant and caches is not None:
            for layer, cache in zip(self.layers, scaled, strict=True):
                if cache.scales != scales:
                    cache.move_to(scales, self._difference_of(layer), self.traditional)
        return self._enter(self._pass(model, scales, lengths))

    def _enter(self, now: Pass) -> CurrentPass:
        self.current.count += 1
        self.current.now = now
        return self.current

    def _length_of_constant(self, new_tokens: int, caches: Sequence[Any] | None) -> int:
        """Length in tokens, for the checks alone; a batch's is not read off its array."""
        offset = getattr(caches[self.layers[0]], "offset", 0) if caches else 0
        return new_tokens + (offset if isinstance(offset, int) else 0)

    def _checked(self, cache: Any) -> ScaledCache:
        if isinstance(cache, ScaledKVCache | ScaledQuantizedKVCache | ScaledBatchKVCache):
            return cache
        kind = "A quantised cache" if isinstance(cache, QuantizedKVCache) else "The cache"
        raise InputError(
            f"{kind} of class {type(cache).__name__} does not know the scale its keys are "
            "rotated at: make caches with mlx_clex.make_prompt_cache(model)."
        )

    def _difference_of(self, layer: int) -> Difference:
        def difference(old: float, new: float) -> mx.array:
            return self.scaling.inv_freq(new, layer) - self.scaling.inv_freq(old, layer)

        return difference

    def _warn_past_reach(self, model: Any, length: int) -> None:
        reach = model.reach
        if reach is not None and length > reach and not self.warned:
            self.warned = True
            warnings.warn(
                f"{length} tokens are past the {reach} that this model's scaling is made "
                "for; answers get worse from there on.",
                stacklevel=4,
            )

    def _pass(self, model: Any, scales: list[float], lengths: list[int]) -> Pass:
        scaling = self.scaling
        new = Pass()
        scale = scales[0]
        same = all(other == scale for other in scales)
        if same:
            new.rotary_gain = scaling.rotary_gain(scale)
        if same and model.training and scaling.trainable_parameters():
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
        if not getattr(scaling.config, "log_scale", False):
            return
        if scaling.gain_by_position:
            new.position_gain = lambda positions: scaling.query_gain(positions, 0)
            return
        if self.fixed_scale is not None:
            lengths = [round(self.fixed_scale * scaling.trained_length)]
        gains = [scaling.query_gain(None, length) for length in lengths]
        if all(gain == gains[0] for gain in gains):
            new.query_gain = gains[0]
        else:
            new.query_gain = mx.array(np.array(gains, np.float32).reshape(-1, 1, 1, 1))
