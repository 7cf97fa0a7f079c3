"""Say what mlx-lm does not read of a published rope, while transformers does.

The answers then differ from those in transformers. Found by the facts of the config and of the
model that mlx-lm builds from it, not by a list of families.

Not covered: anything but the rope.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.nn as nn

from ..model.find_ropes import ropes_in
from ..model.own_rope import ignores_own_rope, own_entry

_YARN_TYPES = ("yarn", "deepseek_yarn", "telechat3-yarn")  # that mlx-lm runs as YaRN


def unread_settings(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return a sentence for each setting of the rope that mlx-lm does not follow.

    Args:
        config: config.json in its normal spelling; the base rope in place of a scaling.
        model: what mlx-lm builds from it.
    """
    found = list(_unread(config.get("text_config") or config, model))
    return [f"{each}: the answers differ from those in transformers." for each in found]


def _unread(config: Mapping[str, Any], model: nn.Module) -> Iterator[str]:
    entry = own_entry(config) or {}
    kind = entry.get("type") or entry.get("rope_type")
    head = config.get("head_dim") or 0
    share = config.get("partial_rotary_factor") or 1
    partial = head > int(share * head)
    ropes = (rope for owner in model.modules() for _, rope in ropes_in(owner))
    if partial and any(type(rope) is nn.RoPE and rope.dims == head for rope in ropes):
        yield (
            f"mlx-lm ignores partial_rotary_factor {share:g} of this model and rotates all {head} "
            "dimensions of a head, where transformers rotates a part"
        )
    if ignores_own_rope(model, config):
        yield f"mlx-lm ignores this model's rope_scaling ({kind}), which transformers reads"
    elif kind in _YARN_TYPES:
        keys = list(_unread_of_yarn(entry))
        if keys:
            yield (
                f"mlx-lm ignores {' and '.join(keys)} of this model's rope_scaling, which "
                "transformers reads"
            )
    elif kind == "longrope" and entry.get("short_factor") != entry.get("long_factor"):
        length = entry.get("original_max_position_embeddings")
        length = length or config.get("original_max_position_embeddings")
        yield (
            f"mlx-lm uses the long_factor of this model's rope_scaling at every length, where "
            f"transformers uses short_factor in texts of up to {length} tokens"
        )


def _unread_of_yarn(entry: Mapping[str, Any]) -> Iterator[str]:
    factor = entry.get("factor")
    usual = 0.1 * math.log(factor) + 1 if isinstance(factor, int | float) and factor >= 1 else 1
    gain = entry.get("attention_factor")
    if isinstance(gain, int | float) and not math.isclose(gain, usual, rel_tol=1e-3):
        yield "attention_factor"
    if entry.get("truncate") is False:
        yield "truncate"
