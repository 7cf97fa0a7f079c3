"""Compute the plan of a sequence: its scale and gain.

Cached tokens may be continued under another plan only if scale and gain are the same. Then every
token equals one pass over the whole text. The server's cached prefixes and the caches on disk
follow this rule.

Not covered: the length to plan for, which each command decides.
"""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from .scaled_model import scaled


def single_caches(caches: Sequence[Any]) -> list[Any]:
    """Return the caches of a sequence, including those inside a `CacheList`."""
    return [
        inside
        for cache in caches
        for inside in (cache.caches if isinstance(cache, CacheList) else [cache])
    ]


def planned_caches(caches: Sequence[Any]) -> list[Any]:
    """Return the caches that have an expected length."""
    return [cache for cache in single_caches(caches) if hasattr(cache, "expected_length")]


def plan_at(model: nn.Module, length: int) -> tuple[Any, ...]:
    """Return (scale, gain) for an expected `length`; () if they do not depend on it."""
    scaling = scaled(model).scaling
    if scaling is None or scaling.static or scaled(model).fixed_scale is not None:
        return ()
    scale = scaling.scale_at(length)
    by_length = scaling.gain_follows == "length"
    gain = scaling.query_gain(None, max(length, 1), scale) if by_length else None
    return (scale, gain)


def plan_of(model: nn.Module, caches: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return the (scale, gain) of every token in the caches; None if they differ."""
    planned = planned_caches(caches)
    if not planned:
        return ()
    expected = planned[0].expected_length
    plan = plan_at(model, expected)
    # Past the expected length, scale and gain follow the text token by token.
    later = plan_at(model, max(expected, planned[0].offset))
    return plan if expected and plan == later else None
