"""Read a long pass in parts, so that no computation on the GPU takes seconds.

macOS ends a computation that takes too long, and attention of one layer is one computation. Its
time grows with queries times keys, so the parts become shorter as the cache grows.

Not covered: passes without a cache, and models without a scaling.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .planner import Planner

# Scores of one layer: heads x queries x keys of all rows. As many as 2,048 tokens of a model with
# 32 heads have at 32,768 tokens; at 131,072 they are read 512 at a time.
MOST_SCORES = 1 << 31
FEWEST = 64  # tokens; shorter passes are never split


def part_length(new_tokens: int, cached: int, heads: int) -> int:
    """Return how many tokens of a pass to read at once.

    Args:
        new_tokens: tokens of the pass, per row.
        cached: tokens in the cache before it.
        heads: query heads of all rows.
    """
    most = max(FEWEST, MOST_SCORES // (heads * (cached + new_tokens)))
    return math.ceil(new_tokens / math.ceil(new_tokens / most))


def read_in_parts(
    read: Callable[..., mx.array], given: dict[str, Any], tokens: mx.array, planner: Planner
) -> mx.array:
    """Return the logits of a pass that has begun, (B, L, V).

    Args:
        read: the call of the stock model.
        given: its arguments, caches included. A pass with others than tokens is not split.
        tokens: what is read, (B, L) or (B, L, hidden).
        planner: of the model.
    """
    rows, total = tokens.shape[:2]
    split = [
        name
        for name, value in given.items()
        if isinstance(value, mx.array) and value.shape[:2] == (rows, total)
    ]
    other = {k: v for k, v in given.items() if k not in split and v is not None}
    length = part_length(total, planner.cached(given["cache"]), rows * planner.heads)
    if length >= total or other.keys() != {"cache"}:
        return read(**given)
    logits: list[mx.array] = []
    for start in range(0, total, length):
        if start:
            # As between the steps of a prompt. The logits wait until they are used.
            mx.eval([cache.state for cache in given["cache"]])
            planner.go_on()
        part = {name: given[name][:, start : start + length] for name in split}
        logits.append(read(**part, **other))
    return mx.concatenate(logits, axis=1)
