"""Normalise the rotary settings of a Hugging Face config.json.

Published configs spell the same setting in several ways: `rope_type` for `type`,
`rope_parameters` since transformers 5, `rotary_emb_base` in gpt_neox, and keys that the
first CLEX release left out. All other modules read only what `normalise_config` returns.

Not covered: families whose class in mlx-lm reads `rope_parameters` of a `text_config` or of each
kind of layer. These stay unchanged.
"""

import dataclasses
import functools
import json
import logging
import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from ..errors import InputError, shown
from ..scaling import SCALINGS
from ..scaling.factor import FactorScaling
from ..scaling.none import NoScaling
from .rope_settings import (
    MODEL_KEYS,
    PLAIN,
    copy_from_parameters,
    hoist,
    merged_scaling,
    set_original_length,
    split_by_layer,
)

SHIM = "mlx_clex_model.py"  # the model_file of converted checkpoints
OURS = "mlx_clex_rope_scaling"  # in place of rope_scaling, where transformers refuses ours
BASE_ROPE = "mlx_clex_base_rope"  # the rope_scaling that the source brings, under ours

# The largest sizes that any model has, with room to spare, by patterns of the families' keys. What
# the weight files of one model can hold is the bound of `sizes.py`.
_SIZES = {
    r"(n|num)_\w*(layer|block)s?": 10_000,
    r"(n|num)_\w*(head|group|expert)s?|head_dim": 1 << 16,
    r"hidden_size|hidden_dim|d_model|n_embd": 1 << 20,
    r"\w*intermediate_size|\w+_rank|\w+_dim": 1 << 22,
    r"\w*vocab_size": 1 << 24,
}
_REQUIRED = (  # that are whole numbers in every family
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_HEADS = ("head_dim", "num_key_value_heads")  # sizes that have defaults in config classes
_LONGEST = 1 << 40  # tokens
_LARGEST_BASE = 1e30  # of rope_theta; float32 holds its frequencies
_GRANITE = {"full_attention": "attention", "linear_attention": "mamba"}  # names of mlx-lm
_AT_LONGEST = ("linear",)  # ropes trained at the longest length of the config, as Vicuna's
_LENGTH_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions")


def normalise_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config with one place and one name for each rotary setting.

    Normalising a normalised config changes nothing.

    Args:
        config: the content of config.json; it is not changed.

    Returns:
        A copy with the top-level keys `rope_theta` (float), `max_position_embeddings` (tokens,
        int) and `rope_scaling` ({"type": name, **fields}; absent for plain RoPE), as far as
        the config or its family define them. For CLEX, `rope_scaling` always has `log_scale`,
        `act` and `time_dt`. `auto_map` is removed because its code is never run.

    Raises:
        InputError: `rope_scaling`, `rope_theta`, the length or a size is not usable.
    """
    if not isinstance(config, dict):
        raise InputError(
            f"config.json holds a {type(config).__name__}, not a JSON object. "
            "Copy the model's own config.json."
        )
    config = _copy(config)
    config.pop("auto_map", None)
    if OURS in config:
        config["rope_scaling"] = config.pop(OURS)
        config["model_file"] = SHIM
    if not _reads_parameters(config):
        split_by_layer(config)
    scaling = merged_scaling(config)
    hoist(config, scaling)
    _set_base(config)
    _mirror_gpt_neox(config)
    _rename_layers(config)
    name = scaling.get("type", PLAIN)
    ours = name in SCALINGS and is_ours(config, name)
    _set_length(config, scaling, ours=ours)
    _settle_text(config)
    _check_sizes(config)
    _set_defaults(config)
    if ours:
        if issubclass(SCALINGS[name], FactorScaling) and "factor" not in scaling:
            raise InputError(
                f"config.json has rope_scaling {shown({'type': name, **scaling})} without a "
                "factor. Copy the model's own config.json."
            )
        scaling.pop("rope_type", None)  # some files of mlx-lm want this name in theirs
        scaling = SCALINGS[name].from_release(scaling, config)
    if name in (PLAIN, NoScaling.name):
        config.pop("rope_scaling", None)
        if config.get("model_file") == SHIM:
            # What remains is mlx-lm's alone.
            del config["model_file"]
            if (base := config.pop(BASE_ROPE, None)) is not None:
                config["rope_scaling"] = base
    else:
        if not ours:
            set_original_length(scaling, config)
        config["rope_scaling"] = scaling
    return config


def _copy(value: Any) -> Any:
    """Return a deep copy, with the infinities of transformers 5, {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
            return float(value["__float__"])
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else deepcopy(value)


def base_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a normalised config with the rope that the source brings, without ours."""
    config = normalise_config(config)
    entry = config.get("rope_scaling")
    if entry is not None and is_ours(config, entry["type"]):
        config["rope_scaling"] = config.pop(BASE_ROPE, None)
        config.pop("model_file", None)
    return config


def is_ours(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether a rope_scaling entry of this type is this project's, not mlx-lm's.

    Types that transformers has too (yarn, linear, dynamic) are ours only in folders that
    mlx_clex has converted; elsewhere mlx-lm runs them as published.
    """
    if name not in SCALINGS:
        return False
    return not SCALINGS[name].in_transformers or config.get("model_file") == SHIM


def _mirror_gpt_neox(config: dict[str, Any]) -> None:
    """Give gpt_neox settings both names: mlx-lm's class reads only the old ones."""
    if config.get("model_type") != "gpt_neox":
        return
    for ours, theirs in zip(MODEL_KEYS, ("rotary_emb_base", "rotary_pct"), strict=True):
        default = (_default("gpt_neox", "rope_parameters") or {}).get(ours)
        value = config.get(ours, config.get(theirs, default))
        if value is not None:
            config[ours] = config[theirs] = value


def _rename_layers(config: dict[str, Any]) -> None:
    """Give the kinds of Granite 4's layers the names of mlx-lm; transformers 5 has others."""
    kinds = config.get("layer_types")
    if config.get("model_type") == "granitemoehybrid" and isinstance(kinds, list):
        config["layer_types"] = [_GRANITE.get(kind, kind) for kind in kinds]


def _set_base(config: dict[str, Any]) -> None:
    base = config.get("rope_theta")
    if base is None:
        base = config.get("rotary_emb_base")
    if base is None:
        rope = _default(str(config.get("model_type")), "rope_parameters")
        rope = rope if isinstance(rope, dict) else {}
        kinds = [kind for kind in rope.values() if isinstance(kind, dict)]  # of layers (OLMo 3)
        bases = {kind.get("rope_theta") for kind in kinds or [rope]}
        base = bases.pop() if len(bases) == 1 else None
    if base is None:
        config.pop("rope_theta", None)
        return
    number = isinstance(base, int | float) and not isinstance(base, bool)
    if not number or not 1 < base < _LARGEST_BASE:
        raise InputError(
            f"config.json has rope_theta = {shown(base)}. It must be a number above 1 and below "
            f"{_LARGEST_BASE:g}, such as 10000."
        )
    config["rope_theta"] = float(base)


def read_by_transformers(config: Mapping[str, Any]) -> Any:
    """Return the config object that transformers makes of a config.json, or None if it cannot.

    The object is shared between calls and must not be changed.
    """
    try:
        text = json.dumps(config, sort_keys=True)
    except (RecursionError, TypeError, ValueError):  # not from a config.json
        return _read(dict(config))
    return _read_text(text)


@functools.lru_cache(maxsize=32)
def _read_text(text: str) -> Any:
    return _read(json.loads(text))


def _read(config: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    family = str(config.get("model_type"))
    known = family in CONFIG_MAPPING
    reader: Any = CONFIG_MAPPING[family] if known else PreTrainedConfig
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader(**deepcopy(config))  # it writes into the config
    except Exception:  # config classes raise anything on settings they do not take
        return None
    finally:
        logger.setLevel(level)


def _set_defaults(config: dict[str, Any]) -> None:
    """Write out what a config leaves to transformers' class where mlx-lm's may differ.

    These are switches, names, numbers with a fraction, and heads; other sizes have to be given.
    """
    fields = _fields(str(config.get("model_type")))
    absent = {name: fraction for name, fraction in fields.items() if name not in config}
    if not absent:
        return
    plain = {k: v for k, v in config.items() if not k.startswith(("rope_", "mlx_clex_"))}
    whole = read_by_transformers(plain)
    if getattr(type(whole), "model_type", "") != config["model_type"]:
        return  # transformers does not know the family
    rope = getattr(whole, "rope_parameters", None) or {}
    for name, fraction in absent.items():
        value = getattr(whole, name, rope.get(name))
        if name == "head_dim" and value is None and "num_attention_heads" in config:
            value = whole.hidden_size // whole.num_attention_heads  # as its attention does
        renamed = type(whole).attribute_map.get(name) in config  # num_experts of Qwen 3
        whole_number = isinstance(value, int) and (fraction or name in _HEADS or renamed)
        # Without a head in the file, a model that is untied by default could not answer.
        unsure = name == "tie_word_embeddings" and not value
        if (isinstance(value, bool | float | str) or whole_number) and not unsure:
            config[name] = value


@functools.cache
def _fields(family: str) -> dict[str, bool]:
    """Return the names that mlx-lm's class of a family reads, and which have a fraction."""
    try:
        module = import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}")
        found = dataclasses.fields(module.ModelArgs)
    except (AttributeError, ImportError, ValueError):  # the builder of the model says so
        return {}
    fields = {field.name: field.type in (float, "float") for field in found}
    fields.pop("rope_theta", None)  # set by itself
    return fields


def _default(family: str, key: str) -> Any:
    """Return a value of transformers' config class, which published configs leave out, or None."""
    return getattr(read_by_transformers({"model_type": family}), key, None)


def set_tied(config: dict[str, Any], *, has_head: bool, same: bool) -> None:
    """Say whether the output head is the embedding, as transformers finds it.

    Absent means untied in transformers and tied in some mlx-lm classes; and a head in the
    file that differs from the embedding is used whatever the config says.

    Args:
        config: config.json; changed in place.
        has_head: whether the checkpoint has a tensor of the head (`model_file.head_name`).
        same: whether it equals the embedding.
    """
    if has_head and not same:
        config["tie_word_embeddings"] = False
    else:
        config.setdefault("tie_word_embeddings", not has_head)


def _settle_text(config: dict[str, Any]) -> None:
    """Settle the ropes of a text_config, and write out its length.

    It may hold only what differs from defaults.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        return
    if "max_position_embeddings" not in text:
        length = _default(str(text.get("model_type")), "max_position_embeddings")
        if length is not None:
            text["max_position_embeddings"] = length
    if "model_type" in text and not _reads_parameters(text):
        copy_from_parameters(text)
        if isinstance(text.get("rope_scaling"), dict):
            set_original_length(text["rope_scaling"], text)


def _reads_parameters(settings: Mapping[str, Any]) -> bool:
    """Return whether mlx-lm's class reads transformers 5's rope_parameters."""
    return "rope_parameters" in _fields(str(settings.get("model_type")))


def _set_length(config: dict[str, Any], scaling: dict[str, Any], *, ours: bool) -> None:
    found = [config[key] for key in _LENGTH_KEYS if config.get(key) is not None]
    length = found[0] if found else None
    if ours:
        # The length that the top level has anyway.
        original = scaling.pop("original_max_position_embeddings", None)
        length = length if original is None else original
    elif scaling.get("type") in _AT_LONGEST:
        length = max((n for n in found if isinstance(n, int | float)), default=length)
    if length is None:
        return
    whole = isinstance(length, int | float) and not isinstance(length, bool)
    if not whole or not 1 <= length <= _LONGEST or length % 1:
        raise InputError(
            f"config.json has max_position_embeddings = {shown(length)}. It must be the "
            f"trained length in tokens, a whole number within 1..{_LONGEST}."
        )
    config["max_position_embeddings"] = int(length)


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse sizes so large that building the model would not finish."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value)
        if any(number != number for number in (value if isinstance(value, list) else [value])):
            raise InputError(f"config.json has {key} = NaN. Copy the model's own config.json.")
        most = next((n for name, n in _SIZES.items() if re.fullmatch(name, str(key))), None)
        if most is None or value is None or isinstance(value, list | dict):
            continue
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if (key in _REQUIRED and not whole) or (isinstance(value, int | float) and value > most):
            raise InputError(
                f"config.json has {key} = {shown(value)}. It must be a whole number within "
                f"1..{most}."
            )
