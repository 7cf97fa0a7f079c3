"""The stretched rope that a model brings, and how to start from a plain one.

Everything is decided by the config: of a checkpoint (config.json) or of a model in memory.

Not covered: the frequencies of a rope (`base_rope.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

from ..errors import InputError, say
from .find_ropes import ropes_in
from .stock import config_of, model_args, stock_class

OWN_ROPES = ("keep", "drop")  # what to do with a rope that the model has stretched
OWN_ROPE_HELP = (
    "What to do with a rope that the model brings stretched (llama3, longrope, yarn). keep: scale "
    "it. drop: scale a plain rope trained at the length before stretching; short texts change, and "
    "training is needed."
)
_PLAIN = (None, "default", "mrope", "proportional")  # types of ropes that are not stretched
_GROWING = ("dynamic",)  # transformers' types that are plain up to the length of the config
# Some files of mlx-lm read these keys without asking whether there is a rope_scaling.
_FACTOR_1 = {"type": "default", "factor": 1.0, "short_factor": 1.0, "long_factor": 1.0}


def own_entry(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rope_scaling entry of a stretched rope, or None if the rope is plain.

    Args:
        config: config.json, or the config of a model as a dict. Settings may be in its
            text_config, and one entry for each layer type.
    """
    config = config.get("text_config") or config
    for key in ("rope_scaling", "rope_parameters"):
        entry = config.get(key)
        if not isinstance(entry, Mapping):
            continue
        for one in (entry, *(v for v in entry.values() if isinstance(v, Mapping))):
            unchanged = one.get("factor") == 1 and "alpha" not in one
            if _type(one) not in _PLAIN and not unchanged:
                return dict(one)
    return None


def original_length(config: Mapping[str, Any]) -> int | None:
    """Return the length before the rope of a model was stretched, in tokens, or None."""
    config = config.get("text_config") or config
    entry = own_entry(config) or {}
    length = entry.get("original_max_position_embeddings")
    length = length or config.get("original_max_position_embeddings")
    whole, factor = config.get("max_position_embeddings"), entry.get("factor")
    if length is None and _type(entry) in _GROWING:
        return whole  # where the rope begins to change
    if length is None and whole and isinstance(factor, int | float) and factor >= 1:
        return int(whole / factor)
    return length


def without_own_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with a plain rope, trained at the length before stretching.

    Raises:
        InputError: the rope is plain, or the config does not have that length.
    """
    if own_entry(config) is None:
        raise plain_rope("drop")
    length = original_length(config)
    if length is None:
        raise InputError(
            "--own-rope drop needs the length before the rope was stretched, but config.json "
            "has no original_max_position_embeddings. Use --own-rope keep."
        )
    text = config.get("text_config")
    plain = dict(text or config)
    plain["max_position_embeddings"] = int(length)
    for key in ("rope_scaling", "rope_parameters"):
        entry = plain.get(key)
        if isinstance(entry, Mapping):
            plain[key] = _plain_entry(entry)
    return {**config, "text_config": plain} if text else plain


def dropped_rope(config: Mapping[str, Any]) -> str | None:
    """Return what --own-rope drop does to a model, for the user; None where it is not possible."""
    entry, length = own_entry(config), original_length(config)
    if entry is None or length is None:
        return None
    return (
        f"--own-rope drop replaces the model's rope ({_type(entry)}) by a plain rope trained at "
        f"{length:,} tokens. "
        + ("" if _type(entry) in _GROWING else "Short texts change, and training is needed.")
    ).strip()


def check_trained_length(config: Mapping[str, Any], length: int | None) -> None:
    """Refuse another trained length where the gain of a kept rope follows the length.

    Args:
        config: with the source's own rope.
        length: what is asked for, tokens; None: that of the config.

    Raises:
        InputError: the rope would be another one in the model that is written.
    """
    entry, written = own_entry(config), config.get("max_position_embeddings")
    if length in (None, written) or entry is None or _type(entry) not in ("longrope", "su"):
        return
    raise InputError(
        f"--trained-length {length}: the gain of the source's own rope ({_type(entry)}) follows "
        f"its length, {written} tokens. Leave the option out, or give --own-rope drop."
    )


def say_if_dropped(model: nn.Module, choice: str | None) -> None:
    """Tell the user of a model whose stretched rope is going to be dropped."""
    text = dropped_rope(config_of(model))
    if choice == "drop" and text is not None:
        say(text)


def plain_rope(choice: str) -> InputError:
    """Return the error for --own-rope on a model with a plain rope."""
    return InputError(f"--own-rope {choice}: the source has a plain rope. Leave the option out.")


def build_plain(build: Callable[[dict[str, Any]], nn.Module], config: dict[str, Any]) -> nn.Module:
    """Return a model of mlx-lm with a plain rope.

    Args:
        build: returns the model of a config.
        config: its config, without a rope_scaling of its own.
    """
    try:
        return build(config)
    except (AttributeError, TypeError):
        length = config.get("max_position_embeddings")
        entry = {**_FACTOR_1, "original_max_position_embeddings": length}
        return build({**config, "rope_scaling": entry})


@contextmanager
def own_rope_settled(model: nn.Module, choice: str | None) -> Iterator[int | None]:
    """Keep or drop the stretched rope of a model, and yield the length its rope was made for.

    An error in the block puts a dropped rope back.

    Args:
        model: a model of mlx-lm; it may have a scaling, which is attached again in the block.
        choice: one of `OWN_ROPES`, or None, which keeps a stretched rope if there is one.

    Raises:
        InputError: there is a choice, but the rope is plain; or as `without_own_rope`.
    """
    if choice not in (None, *OWN_ROPES):
        raise InputError(f"own_rope must be one of {', '.join(OWN_ROPES)}, got {choice!r}.")
    config = config_of(model)
    if choice == "keep" and own_entry(config) is None:
        raise plain_rope(choice)
    if choice != "drop":
        yield length_of(model, config)
        return
    before = _swap_in(model, _plain_twin(model, config))
    try:
        yield original_length(config)
    except BaseException:
        for module, name, value in before:
            setattr(module, name, value)
        raise


def length_of(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """Return the length that the rope of a model was made for, in tokens, or None."""
    length = (config.get("text_config") or config).get("max_position_embeddings")
    return original_length(config) if ignores_own_rope(model, config) else length


def ignores_own_rope(model: nn.Module, config: Mapping[str, Any]) -> bool:
    """Return whether mlx-lm's file of the family builds plain ropes whatever the config says."""
    if own_entry(config) is None or original_length(config) is None:
        return False
    ropes = [rope for owner in model.modules() for _, rope in ropes_in(owner)]
    return all(type(rope) is nn.RoPE and rope.scale == 1.0 for rope in ropes)


def _plain_twin(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Return the model that the config without its own rope describes; its weights are lazy."""
    args_class: Any = type(model_args(model))
    stock = stock_class(model)
    return build_plain(lambda c: stock(args_class.from_dict(c)), without_own_rope(config))


def _swap_in(model: nn.Module, twin: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Give a model the ropes of its twin; return the values that were replaced.

    The numbers beside a rope go with it: DeepSeek's yarn changes the scale of the attention.
    """
    twins = dict(twin.named_modules())
    before: list[tuple[nn.Module, str, Any]] = []
    for path, module in model.named_modules():
        plain: dict[str, Any] = dict(ropes_in(twins[path])) if path in twins else {}
        if plain:
            plain |= {k: v for k, v in vars(twins[path]).items() if isinstance(v, float)}
        for name, value in plain.items():
            before.append((module, name, getattr(module, name)))
            setattr(module, name, value)
    return before


def _plain_entry(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return an entry with the base and rotated share of another, and no stretching."""
    if any(isinstance(value, Mapping) for value in entry.values()):
        return {k: _plain_entry(v) if isinstance(v, Mapping) else v for k, v in entry.items()}
    if _type(entry) in _PLAIN:
        return dict(entry)
    kept = {k: entry[k] for k in ("rope_theta", "partial_rotary_factor") if k in entry}
    return {"rope_type": "default", **kept} if kept else None


def _type(entry: Mapping[str, Any]) -> Any:
    return entry.get("type") or entry.get("rope_type")
