"""The fields of a method's `Config`, and their values from a rope_scaling entry."""

from collections.abc import Mapping
from dataclasses import field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from ..errors import InputError, shown

_LARGEST = 1e9  # of a number in rope_scaling: factors, lengths and bounds of any model


def option(default: Any, text: str) -> Any:
    """Return a dataclass field of a `Config`: its default, and a sentence for --help.

    An empty text is for a key of published configs that has no effect, and gives no option.
    """
    return field(default=default, metadata={"help": text})


def parse_config(config_class: type, rope_scaling: Mapping[str, Any]) -> Any:
    """Return the `Config` for a `rope_scaling` entry.

    Raises:
        InputError: an unknown key, or a value of the wrong type or range.
    """
    types = get_type_hints(config_class)
    known = [field.name for field in fields(config_class)]
    given = {k: v for k, v in rope_scaling.items() if k not in ("type", "rope_type")}
    for key in given:
        if key not in known:
            name = rope_scaling.get("type", rope_scaling.get("rope_type"))
            raise InputError(
                f"rope_scaling has the key {key!r}, which type {name!r} does not have. "
                f"It has: {', '.join(known) or 'no keys'}."
            )
    return config_class(**{k: _cast(k, v, types[k]) for k, v in given.items()})


def _cast(key: str, value: Any, wanted: Any) -> Any:
    if isinstance(wanted, UnionType):
        if value is None:
            return None
        (wanted,) = (t for t in get_args(wanted) if t is not NoneType)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    number = number and -_LARGEST <= value <= _LARGEST  # false for NaN
    if wanted is float and number:
        return float(value)
    if wanted is int and number and value == int(value):
        return int(value)
    if wanted not in (int, float) and isinstance(value, wanted):
        return value
    kind = {float: "a number", int: "a whole number", bool: "true or false"}
    raise InputError(
        f"rope_scaling.{key} must be {kind.get(wanted, 'a string')}"
        f"{f' of at most {_LARGEST:g}' if wanted in (int, float) else ''}, got {shown(value)}."
    )
