"""Finds, in any mlx-lm model, the ropes a scaling can replace and the keys they rotate.

mlx-lm has about a hundred model files, and they differ in what matters here: the name
of the rope, whether queries or keys come first, which part of a key is rotated, in which
cache it is kept and where. None of that is read off names. The stock model makes one
pass over two tokens in which every rope hands out random arrays of its own and every
cache tells what it is given, so a key is found wherever it went. MLX is lazy: almost
nothing of that pass is ever computed, and no weight is read to find a plain key.

Not covered: models that rotate without a rope module, which are refused, and positions
learned or added in other ways.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import CacheList, KVCache

from ..errors import InputError
from .base_rope import BaseRope, NoVectorError, measured_rope, stands_still
from .cache import Place
from .stock import config_value, model_name, stock_caches, stock_class

_NAMES = ("rope", "rotary")  # the attribute of a rope has one of them in it


@dataclass(frozen=True)
class RotatedKeys:
    """A cache with keys that a rope rotated."""

    path: tuple[int, ...]  # of the cache: its index, and one more inside a `CacheList`
    layer: int
    place: Place

    def cache(self, caches: Any) -> Any:
        """This cache, out of those of a model."""
        for index in self.path:
            caches = caches[index]
        return caches


@dataclass
class Site:
    """A rope module that a scaling takes the place of."""

    layer: int
    owner: nn.Module  # the attention
    name: str  # the rope's attribute there
    rope: BaseRope
    calls: int  # in one pass
    query_call: int = 0  # which of them has the queries, from 0
    heads: int = 1
    key_heads: int = 1
    keys: list[RotatedKeys] = field(default_factory=list)
    unmovable: str | None = None  # why cached keys cannot move to another scale
    ungainable: str | None = None  # why queries cannot be multiplied


def find_sites(model: nn.Module) -> list[Site]:
    """The ropes of layers with full attention, in the order in which a pass calls them.

    Layers with a sliding window, and those that keep a recurrent state, keep their rope.

    Raises:
        InputError: nothing can be scaled, or ropes that one scaling cannot replace; the
            message says what was looked for and what was found.
    """
    if getattr(model, "layers", None) is None:
        raise InputError(f"{model_name(model)} has no `layers`; attach serves mlx-lm models only.")
    ropes = [
        (owner, name, rope)
        for owner in model.modules()
        for name, rope in owner.children().items()
        if isinstance(rope, nn.Module) and any(part in name for part in _NAMES)
    ]
    log = _listen(model, ropes) if ropes else []
    sites = _sort_out(model, ropes, log)
    if not sites:
        raise InputError(_nothing_found(model, ropes, log))
    if len({(r.dims, r.pairs, r.inv_freq, r.base, r.gain) for r in (s.rope for s in sites)}) > 1:
        raise InputError(
            f"The layers of {model_name(model)} have ropes of different dimensions or frequencies; "
            "one scaling cannot serve them all."
        )
    return sites


# The pass that is listened to.


@dataclass(eq=False)
class _Rotated:
    rope: int  # which of the ropes
    out: mx.array
    odd: bool  # called with more than an array and an offset


@dataclass(eq=False)
class _Cached:
    path: tuple[int, ...]
    kind: type
    keys: mx.array
    values: mx.array


_Log = list[_Rotated | _Cached]


class _Spy(nn.Module):
    """Stands for a rope, and hands out random arrays that can be told apart."""

    def __init__(self, rope: nn.Module, index: int, log: _Log) -> None:
        super().__init__()
        self._stock = rope
        self._index = index
        self._log = (log,)  # a list would be taken for parameters

    def __getattr__(self, name: str) -> Any:
        if name in self or "_stock" not in self:
            return super().__getattr__(name)
        return getattr(self["_stock"], name)

    def __call__(self, x: mx.array, offset: Any = 0, **kwargs: Any) -> mx.array:
        (log,) = self._log
        # Far from norm 1, so that a norm after the rope is seen to change it.
        out = mx.random.normal(x.shape, scale=4.0, key=mx.random.key(len(log))).astype(x.dtype)
        log.append(_Rotated(self._index, out, bool(kwargs)))
        return out


def _listen(model: nn.Module, ropes: list[tuple[nn.Module, str, nn.Module]]) -> _Log:
    log: _Log = []
    caches = stock_caches(model)
    for index, cache in enumerate(caches):
        _tap(cache, (index,), log)
    weights = model.parameters()
    stock: Any = stock_class(model)
    (_, tokens, *_) = inspect.signature(stock.__call__).parameters
    try:
        for index, (owner, name, rope) in enumerate(ropes):
            setattr(owner, name, _Spy(rope, index, log))
        # Where a key is joined to something else, that is computed; let it cost nothing.
        model.update(tree_map(_nothing_like, weights))
        stock.__call__(model, **{tokens: mx.array([[0, 1]]), "cache": caches})
    except Exception as error:  # whatever a model file may raise
        raise InputError(
            f"attach makes one pass of two tokens to see how {model_name(model)} uses its "
            f"ropes, and that failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        for owner, name, rope in ropes:
            setattr(owner, name, rope)
        model.update(weights)
    return log


def _nothing_like(weight: mx.array) -> mx.array:
    return mx.broadcast_to(mx.array(0, weight.dtype), weight.shape)


def _tap(cache: Any, path: tuple[int, ...], log: _Log) -> None:
    """Have a cache tell what it is given."""
    for index, inside in enumerate(cache.caches if isinstance(cache, CacheList) else ()):
        _tap(inside, (*path, index), log)
    kind: Any = type(cache)
    if not hasattr(kind, "update_and_fetch"):
        return

    def update_and_fetch(self: Any, keys: mx.array, values: mx.array) -> Any:
        log.append(_Cached(path, kind, keys, values))
        return kind.update_and_fetch(self, keys, values)

    cache.__class__ = type(kind.__name__, (kind,), {"update_and_fetch": update_and_fetch})


# What it tells.


def _sort_out(
    model: nn.Module, ropes: list[tuple[nn.Module, str, nn.Module]], log: _Log
) -> list[Site]:
    sites: dict[int, Site] = {}  # by rope, those in use with a full cache
    window: set[int] = set()  # ropes in use with any other cache
    found: dict[Any, tuple[int, Place] | None] = {}  # attentions alike are looked at once
    waiting: list[_Rotated] = []  # calls whose output no cache has been given yet
    for event in log:
        if isinstance(event, _Rotated):
            if not stands_still(ropes[event.rope][2], event.out):
                waiting.append(event)
            continue
        # The rope called last is the likeliest, but an indexer may have come in between.
        candidates = list(dict.fromkeys(call.rope for call in reversed(waiting)))
        for rope in candidates:
            calls = [call for call in waiting if call.rope == rope]
            shapes = [array.shape for array in (*_outs(calls), event.keys, event.values)]
            alike = (type(ropes[rope][0]), ropes[rope][1], *shapes)
            if alike not in found:
                found[alike] = _find_keys(calls, event)
            if found[alike] is not None:
                break
        else:
            if not candidates:
                continue  # a layer without positions
            rope = candidates[0]
            calls = [call for call in waiting if call.rope == rope]
        waiting = [call for call in waiting if call.rope != rope]
        if event.kind is not KVCache:
            window.add(rope)
            continue
        if rope not in sites:
            sites[rope] = _site(model, ropes, rope, calls, log)
        every = [other for other in log if isinstance(other, _Rotated) and other.rope == rope]
        _add_keys(sites[rope], calls, every, event, found[alike])
    for rope in window & sites.keys():
        sites[rope].unmovable = "one rope serves a full cache and a window, whose keys stay"
    _add_query_only(model, ropes, sites, window, log)
    return list(sites.values())


def _outs(calls: list[_Rotated]) -> list[mx.array]:
    return [call.out for call in calls]


def _site(
    model: nn.Module,
    ropes: list[tuple[nn.Module, str, nn.Module]],
    rope: int,
    calls: list[_Rotated],
    log: _Log,
) -> Site:
    owner, name, module = ropes[rope]
    layers = [
        index
        for index, layer in enumerate(model.layers)
        if any(inside is owner for inside in layer.modules())
    ]
    if any(call.odd for call in calls):
        raise InputError(
            f"{model_name(model)} calls its rope with more than an array and an offset, which "
            "a scaling does not know."
        )
    try:
        base = measured_rope(module, calls[0].out.shape[-1], config_value(model, "rope_theta"))
    except NoVectorError as error:
        raise InputError(
            f"{model_name(model)} has a rope ({type(module).__name__}) that no list of frequencies "
            f"describes: {error}. Start from plain positions with --own-rope drop."
        ) from error
    in_a_pass = sum(isinstance(event, _Rotated) and event.rope == rope for event in log)
    heads = calls[0].out.shape[1]
    return Site(layers[0] if layers else 0, owner, name, base, in_a_pass, 0, heads, heads)


def _find_keys(calls: list[_Rotated], event: _Cached) -> tuple[int, Place] | None:
    """Which call made the cached keys, and where in the cache they are."""
    places = [
        (call, Place(part, start), array[..., start : start + call.out.shape[-1]])
        for part, array in (("keys", event.keys), ("values", event.values))
        for call in calls
        for start in sorted({0, array.shape[-1] - call.out.shape[-1]})
        if start >= 0
    ]

    # First those that are all of what is cached: looking at a part computes the rest.
    def partial(candidate: tuple[_Rotated, Place, mx.array]) -> bool:
        call, place, _ = candidate
        cached = event.keys if place.part == "keys" else event.values
        return cached.shape[-1] != call.out.shape[-1]

    for call, place, cached in sorted(places, key=partial):
        if cached.shape[2] == call.out.shape[2] and cached.shape[1] % call.out.shape[1] == 0:
            repeats = cached.shape[1] // call.out.shape[1]
            if mx.allclose(cached, mx.repeat(call.out, repeats, axis=1), rtol=1e-2, atol=1e-2):
                return calls.index(call), place
    return None


def _add_keys(
    site: Site,
    calls: list[_Rotated],
    every: list[_Rotated],
    event: _Cached,
    found: tuple[int, Place] | None,
) -> None:
    """Note one more cache of a rope; `calls` led to it, out of `every` one in the pass."""
    if found is None:
        site.unmovable = site.ungainable = "keys are changed after they are rotated"
        site.keys.append(RotatedKeys(event.path, site.layer, Place()))
        return
    key_call, place = found
    keys = calls[key_call]
    queries = next((call for call in every if call is not keys), keys)
    site.query_call = every.index(queries)
    site.heads, site.key_heads = queries.out.shape[1], keys.out.shape[1]
    if place != Place() or event.keys.shape[-1] != keys.out.shape[-1]:
        site.ungainable = "its rope sees a part of each query only"
    elif len(every) != 2:
        site.ungainable = f"the calls of its rope in a pass are {len(every)}, not 2"
    place = Place(place.part, place.start, site.rope.traditional, site.rope.pairs)
    site.keys.append(RotatedKeys(event.path, site.layer, place))


def _add_query_only(
    model: nn.Module,
    ropes: list[tuple[nn.Module, str, nn.Module]],
    sites: dict[int, Site],
    window: set[int],
    log: _Log,
) -> None:
    """Layers that read another layer's keys rotate queries as those keys are rotated."""
    seen: list[int] = []
    for event in log:
        if not isinstance(event, _Rotated) or event.rope in seen:
            continue
        rope = event.rope
        seen.append(rope)
        calls = [other for other in log if isinstance(other, _Rotated) and other.rope == rope]
        if rope in sites or rope in window or len(calls) != 1:
            continue  # two calls and no cache: the keys go into a recurrent state
        sliding = getattr(ropes[rope][0], "is_sliding", None)
        before = [
            other
            for other in seen
            if (other in sites or other in window)
            and getattr(ropes[other][0], "is_sliding", None) == sliding
        ]
        if before and before[-1] in sites:
            source = sites[before[-1]]
            site = sites[rope] = _site(model, ropes, rope, calls, log)
            site.heads, site.key_heads = source.heads, source.key_heads
            site.unmovable, site.ungainable = source.unmovable, source.ungainable


def _nothing_found(
    model: nn.Module, ropes: list[tuple[nn.Module, str, nn.Module]], log: _Log
) -> str:
    name = model_name(model)
    kinds = sorted({type(cache).__name__ for cache in stock_caches(model)})
    if any(isinstance(event, _Rotated) for event in log):
        return (
            f"{name} uses its ropes only in layers with other caches than a KVCache, such as a "
            f"window or a recurrent state ({', '.join(kinds)}): there is nothing to scale."
        )
    if ropes:
        return f"{name} has a rope, but rotates without calling it: a scaling cannot stand there."
    inside = sorted({text for layer in model.layers for text in _attentions(layer)})
    return (
        f"attach looked for a module named `rope` or `rotary_emb` in {name} and found none (it "
        f"has: {'; '.join(inside) or 'no attention module'}; caches: {', '.join(kinds)})."
    )


def _attentions(layer: nn.Module) -> Iterator[str]:
    for module in layer.modules():
        if "ttention" in type(module).__name__:
            yield f"{type(module).__name__}: {', '.join(module.children())}"
