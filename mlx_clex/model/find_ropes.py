"""Find the ropes that a scaling can replace, and the keys they rotate, in any mlx-lm model.

mlx-lm has about a hundred model files. They differ in the name of the rope, the order of queries
and keys, the rotated part of a key, and its place in the cache. To find these, the stock model
makes one pass over two tokens. In that pass every rope returns its own random arrays and every
cache logs its input, so rotated keys are recognised in the caches. MLX is lazy: almost nothing of
the pass is computed, and no weight is read to find a plain key.

Not covered: models that rotate without a rope module (refused), and learned or added positions.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import CacheList, KVCache

from ..errors import InputError
from .base_rope import BaseRope, NoVectorError, measured_rope, stands_still
from .cache import Place
from .stock import config_value, model_name, stock_caches, stock_class

_NAMES = ("rope", "rotary")  # the attribute name of a rope contains one of these


@dataclass(frozen=True)
class RotatedKeys:
    """A cache with keys that a rope rotated."""

    path: tuple[int, ...]  # index of the cache, and one more index inside a `CacheList`
    layer: int
    place: Place

    def cache(self, caches: Any) -> Any:
        """Return this cache from the caches of a model."""
        for index in self.path:
            caches = caches[index]
        return caches


@dataclass
class Site:
    """A rope module that a scaling replaces."""

    layer: int
    owner: nn.Module  # the attention module
    name: str  # its attribute with the rope
    rope: BaseRope
    calls: int  # calls in one pass
    query_call: int = 0  # index of the call that rotates the queries
    heads: int = 1
    key_heads: int = 1
    keys: list[RotatedKeys] = field(default_factory=list)
    unmovable: str | None = None  # why cached keys cannot be rotated to another scale
    ungainable: str | None = None  # why queries cannot be multiplied


def find_sites(model: nn.Module) -> list[Site]:
    """Return the ropes of layers with full attention, in the order of their calls.

    Layers with a sliding window or a recurrent state keep their rope.

    Raises:
        InputError: there is no rope to scale, or one scaling cannot replace all ropes.
    """
    if getattr(model, "layers", None) is None:
        raise InputError(f"{model_name(model)} has no `layers`. attach takes mlx-lm models only.")
    layer_of = {
        id(module): index
        for index, layer in reversed(list(enumerate(model.layers)))
        for module in layer.modules()
    }
    ropes = [
        _Found(owner, *rope, layer_of.get(id(owner), 0))
        for owner in model.modules()
        for rope in ropes_in(owner)
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


def ropes_in(owner: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the attributes of a module that are ropes, with their names."""
    return [
        (name, rope)
        for name, rope in owner.items()
        if any(part in name for part in _NAMES) and isinstance(rope, nn.Module)
    ]


class _Found(NamedTuple):
    owner: nn.Module
    name: str
    rope: nn.Module
    layer: int


# The logged pass.


@dataclass(eq=False)
class _Rotated:
    rope: int  # index of the rope
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
    """Replaces a rope during the pass; returns a different random array at each call."""

    def __init__(self, rope: nn.Module, index: int, log: _Log) -> None:
        super().__init__()
        self._stock = rope
        self._index = index
        self._log = (log,)  # nn.Module would treat a list as parameters

    def __getattr__(self, name: str) -> Any:
        if name in self or "_stock" not in self:
            return super().__getattr__(name)
        return getattr(self["_stock"], name)

    def __call__(self, x: mx.array, offset: Any = 0, **kwargs: Any) -> mx.array:
        (log,) = self._log
        # Far from norm 1, so that a norm layer after the rope changes it visibly.
        out = mx.random.normal(x.shape, scale=4.0, key=mx.random.key(len(log))).astype(x.dtype)
        log.append(_Rotated(self._index, out, bool(kwargs)))
        return out


def _listen(model: nn.Module, ropes: list[_Found]) -> _Log:
    log: _Log = []
    caches = stock_caches(model)
    for index, cache in enumerate(caches):
        _tap(cache, (index,), log)
    weights = model.parameters()
    stock: Any = stock_class(model)
    (_, tokens, *_) = inspect.signature(stock.__call__).parameters
    try:
        for index, found in enumerate(ropes):
            setattr(found.owner, found.name, _Spy(found.rope, index, log))
        # Data that is concatenated with a key is computed; zero weights make it cheap.
        model.update(tree_map(_nothing_like, weights))
        stock.__call__(model, **{tokens: mx.array([[0, 1]]), "cache": caches})
    except Exception as error:  # model files may raise any exception
        raise InputError(
            f"attach makes one pass of two tokens to find the ropes of {model_name(model)}, but "
            f"the pass failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        for found in ropes:
            setattr(found.owner, found.name, found.rope)
        model.update(weights)
    return log


def _nothing_like(weight: mx.array) -> mx.array:
    return mx.broadcast_to(mx.array(0, weight.dtype), weight.shape)


def _tap(cache: Any, path: tuple[int, ...], log: _Log) -> None:
    """Make a cache log its input."""
    for index, inside in enumerate(cache.caches if isinstance(cache, CacheList) else ()):
        _tap(inside, (*path, index), log)
    kind: Any = type(cache)
    if not hasattr(kind, "update_and_fetch"):
        return

    def update_and_fetch(self: Any, keys: mx.array, values: mx.array) -> Any:
        log.append(_Cached(path, kind, keys, values))
        return kind.update_and_fetch(self, keys, values)

    cache.__class__ = type(kind.__name__, (kind,), {"update_and_fetch": update_and_fetch})


# Evaluation of the log.


def _sort_out(model: nn.Module, ropes: list[_Found], log: _Log) -> list[Site]:
    sites: dict[int, Site] = {}  # ropes with a full cache, by index
    window: set[int] = set()  # ropes with any other cache
    found: dict[Any, tuple[int, Place] | None] = {}  # equal attention modules are searched once
    waiting: list[_Rotated] = []  # calls whose output is not in a cache yet
    for event in log:
        if isinstance(event, _Rotated):
            if not stands_still(ropes[event.rope].rope, event.out):
                waiting.append(event)
            continue
        # Most often the last rope that was called, but an indexer may be called in between.
        candidates = list(dict.fromkeys(call.rope for call in reversed(waiting)))
        for rope in candidates:
            calls = _calls_of(rope, waiting)
            shapes = [array.shape for array in (*(c.out for c in calls), event.keys, event.values)]
            alike = (type(ropes[rope].owner), ropes[rope].name, *shapes)
            if alike not in found:
                found[alike] = _find_keys(calls, event)
            if found[alike] is not None:
                break
        else:
            if not candidates:
                continue  # a layer without positions
            rope = candidates[0]
            calls = _calls_of(rope, waiting)
        waiting = [call for call in waiting if call.rope != rope]
        if event.kind is not KVCache:
            window.add(rope)
            continue
        if rope not in sites:
            sites[rope] = _site(model, ropes, rope, calls, log)
        _add_keys(sites[rope], calls, _calls_of(rope, log), event, found[alike])
    for rope in window & sites.keys():
        sites[rope].unmovable = "one rope rotates keys of a full cache and of a window"
    _add_query_only(model, ropes, sites, window, log)
    return list(sites.values())


def _calls_of(rope: int, log: Sequence[_Rotated | _Cached]) -> list[_Rotated]:
    return [event for event in log if isinstance(event, _Rotated) and event.rope == rope]


def _site(
    model: nn.Module, ropes: list[_Found], rope: int, calls: list[_Rotated], log: _Log
) -> Site:
    owner, name, module, layer = ropes[rope]
    if any(call.odd for call in calls):
        raise InputError(
            f"{model_name(model)} calls its rope with arguments besides an array and an offset. "
            "A scaling cannot replace this rope."
        )
    try:
        base = measured_rope(module, calls[0].out.shape[-1], config_value(model, "rope_theta"))
    except NoVectorError as error:
        raise InputError(
            f"No list of frequencies describes the rope of {model_name(model)} "
            f"({type(module).__name__}): {error}. Start from a plain rope with --own-rope drop."
        ) from error
    heads = calls[0].out.shape[1]
    in_a_pass = len(_calls_of(rope, log))
    return Site(layer, owner, name, base, in_a_pass, 0, heads, heads)


def _find_keys(calls: list[_Rotated], event: _Cached) -> tuple[int, Place] | None:
    """Return the index of the call that made the cached keys, and their place."""
    places = [
        (call, Place(part, start), array)
        for part, array in (("keys", event.keys), ("values", event.values))
        for call in calls
        for start in sorted({0, array.shape[-1] - call.out.shape[-1]})
        if start >= 0
    ]

    # The same array first, as in most families, then whole arrays: comparing computes them, and
    # comparing a part computes the rest of the array.
    def order(candidate: tuple[_Rotated, Place, mx.array]) -> tuple[bool, bool]:
        call, _, array = candidate
        return array is not call.out, array.shape[-1] != call.out.shape[-1]

    for call, place, array in sorted(places, key=order):
        if array is call.out:
            return calls.index(call), place
        cached = array[..., place.start : place.start + call.out.shape[-1]]
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
    """Add a cache to a site: `calls` filled it, `every` is all calls of the rope."""
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
        site.ungainable = "its rope gets only a part of each query"
    elif len(every) != 2:
        site.ungainable = f"the number of calls of its rope in a pass is {len(every)}, not 2"
    place = Place(place.part, place.start, site.rope.traditional, site.rope.pairs)
    site.keys.append(RotatedKeys(event.path, site.layer, place))


def _add_query_only(
    model: nn.Module,
    ropes: list[_Found],
    sites: dict[int, Site],
    window: set[int],
    log: _Log,
) -> None:
    """Add the ropes of layers that only rotate queries, for the keys of another layer."""
    seen: list[int] = []
    for event in log:
        if not isinstance(event, _Rotated) or event.rope in seen:
            continue
        rope = event.rope
        seen.append(rope)
        calls = _calls_of(rope, log)
        if rope in sites or rope in window or len(calls) != 1:
            continue  # two calls and no cache: the keys go into a recurrent state
        sliding = getattr(ropes[rope].owner, "is_sliding", None)
        before = [
            other
            for other in seen
            if (other in sites or other in window)
            and getattr(ropes[other].owner, "is_sliding", None) == sliding
        ]
        if before and before[-1] in sites:
            source = sites[before[-1]]
            site = sites[rope] = _site(model, ropes, rope, calls, log)
            site.heads, site.key_heads = source.heads, source.key_heads
            site.unmovable, site.ungainable = source.unmovable, source.ungainable


def _nothing_found(model: nn.Module, ropes: list[_Found], log: _Log) -> str:
    name = model_name(model)
    kinds = sorted({type(cache).__name__ for cache in stock_caches(model)})
    if any(isinstance(event, _Rotated) for event in log):
        return (
            f"{name} has ropes only in layers with other caches than a KVCache, such as a window "
            f"or a recurrent state ({', '.join(kinds)}), so there is no rope to scale."
        )
    if ropes:
        return f"{name} has a rope but does not call it, so a scaling cannot replace it."
    inside = sorted({text for layer in model.layers for text in _attentions(layer)})
    return (
        f"attach looked for a module named `rope` or `rotary_emb` in {name} and found none (it "
        f"has: {'; '.join(inside) or 'no attention module'}; caches: {', '.join(kinds)})."
    )


def _attentions(layer: nn.Module) -> Iterator[str]:
    for module in layer.modules():
        if "ttention" in type(module).__name__:
            yield f"{type(module).__name__}: {', '.join(module.children())}"
