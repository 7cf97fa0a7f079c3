"""The scale and gain a sequence is planned for.

What was computed under one plan may be continued under another only where both have the
same scale and gain: then every token is what one pass over the whole text gives. The
server's cached prefixes and the caches on disk are held to it.

Not covered: which length to plan for, which each command decides.
"""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from .scaled_model import scaled


def single_caches(caches: Sequence[Any]) -> list[Any]:
    """The caches of a sequence, those inside a `CacheList` too."""
    return [
        inside
        for cache in caches
        for inside in (cache.caches if isinstance(cache, CacheList) else [cache])
    ]


def planned_caches(caches: Sequence[Any]) -> list[Any]:
    """Those of them whose keys follow a plan."""
    return [cache for cache in single_caches(caches) if hasattr(cache, "expected_length")]


def plan_at(model: nn.Module, length: int) -> tuple[Any, ...]:
    """(scale, gain) of a sequence planned for `length` tokens; () where nothing varies."""
    scaling = scaled(model).scaling
    if scaling is None or scaling.static or scaled(model).fixed_scale is not None:
        return ()
    by_length = scaling.gain_follows == "length"
    gain = scaling.query_gain(None, max(length, 1)) if by_length else None
    return (scaling.scale_at(length), gain)


def plan_of(model: nn.Module, caches: Sequence[Any]) -> tuple[Any, ...] | None:
    """The (scale, gain) at which every token in the caches was computed, or None."""
    planned = planned_caches(caches)
    if not planned:
        return ()
    expected = planned[0].expected_length
    plan = plan_at(model, expected)
    # Past the expected length scale and gain follow the text, token by token.
    later = plan_at(model, max(expected, planned[0].offset))
    return plan if expected and plan == later else None
