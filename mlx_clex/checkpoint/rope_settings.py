"""Bring the rotary settings of a config.json to the spelling that mlx-lm's classes read.

transformers 5 writes `rope_parameters`, with the base of the rotation inside, one for each kind of
layer where they differ. Most classes of mlx-lm read the older `rope_scaling` and `rope_theta`.

Not covered: families whose class in mlx-lm reads `rope_parameters`; theirs stay unchanged.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, shown
from ..scaling import SCALINGS

PLAIN = "default"  # transformers' name of a rope without scaling
# Settings of the model that transformers 5 keeps inside rope_parameters.
MODEL_KEYS = ("rope_theta", "partial_rotary_factor")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_FROM_LENGTH = ("llama3", "yarn", "longrope")  # types that need the length before stretching
_OLD_NAMES = {"su": "longrope"}  # types by the names of early checkpoints


def merged_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """Remove `rope_scaling` and `rope_parameters` from a config; return them as one dict.

    `rope_parameters` of the kinds of layers stay.

    Raises:
        InputError: one of them is no rope_scaling.
    """
    merged: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None:
            config.pop(key, None)
            continue
        if not isinstance(value, dict):
            raise InputError(
                f"config.json has {key} = {shown(value)}. It must be null or an object such as "
                '{"type": "clex", "max_factor": 16}.'
            )
        if key == "rope_parameters" and _by_layer(value):
            continue
        config.pop(key)
        value = dict(value)
        alias = value.get("rope_type")
        merged.update(value, type=value.get("type") or alias or merged.get("type"))
    name = merged.pop("type", None)
    if name is not None and not isinstance(name, str):
        raise InputError(f"rope_scaling.type must be a name, got {shown(name)}.")
    if name is None and set(merged) - {*MODEL_KEYS, "rope_type"}:
        raise InputError(
            f"config.json has rope_scaling {shown(merged)} without a type. "
            f'Add "type", one of: {", ".join(SCALINGS)}.'
        )
    if name in _OLD_NAMES:
        name = _OLD_NAMES[name]
        merged.pop("rope_type", None)
    return {"type": name, **merged} if name else merged


def split_by_layer(config: dict[str, Any]) -> None:
    """Replace the `rope_parameters` of full and sliding layers by Gemma 3's older settings."""
    kinds = _by_layer(config.get("rope_parameters"))
    if _FULL in kinds:
        _take(config, kinds[_FULL])
        local = kinds.get(_SLIDING, {}).get("rope_theta")
        if local not in (None, config.get("rope_theta")):
            config["rope_local_base_freq"] = local
        del config["rope_parameters"]


def copy_from_parameters(text: dict[str, Any]) -> None:
    """Add the older settings to a text_config, beside its `rope_parameters`."""
    given = text.get("rope_parameters")
    if _by_layer(given):
        split_by_layer(text)
        text["rope_parameters"] = given
    elif isinstance(given, Mapping):
        _take(text, given)


def set_original_length(entry: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Write out the length before stretching as transformers 5 does; lengths in tokens.

    Args:
        entry: a rope_scaling that is not of this project; changed in place.
        config: the settings around it.
    """
    key = "original_max_position_embeddings"
    length = config.get(key) or entry.get(key) or config.get("max_position_embeddings")
    if (entry.get("type") or entry.get("rope_type")) in _FROM_LENGTH and length:
        entry[key] = length


def hoist(config: dict[str, Any], entry: dict[str, Any]) -> None:
    """Move settings of the model from its rope_scaling to the level above."""
    for key in MODEL_KEYS:
        if key in entry:
            config[key] = entry.pop(key)


def _take(config: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    entry = dict(parameters)
    config.update({key: entry[key] for key in MODEL_KEYS if key in entry})
    kind = entry.pop("rope_type", None)
    entry["type"] = entry.get("type") or kind or PLAIN
    if entry["type"] != PLAIN:
        config.setdefault("rope_scaling", entry)


def _by_layer(parameters: Any) -> dict[str, dict[str, Any]]:
    """Return the entries of rope_parameters by the kind of layer; none if it is one entry."""
    found = parameters if isinstance(parameters, Mapping) else {}
    return {kind: entry for kind, entry in found.items() if isinstance(entry, dict)}
