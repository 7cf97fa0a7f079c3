"""Options from the fields of a dataclass: arguments, YAML keys, checks.

A field made by `option` knows its unit, range, choices, help text and group; its name, type
and default are the dataclass's own.

Not covered: which options there are (`options.py`).
"""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from mlx_lm.lora import yaml_loader

from ..checkpoint.files import open_regular
from ..errors import InputError, reading, shown

_LARGEST_CONFIG = 1_000_000  # bytes
_LONGEST = 64  # numbers of a list
# What a value must be, for messages.
_KINDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text (in quotes)",
    dict: "a block of `key: value` lines",
    list: "a list of up to 64 whole numbers, in a YAML file [4096, 8192]",
}


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """What is known of an option beside its name, type and default."""

    group: str
    help: str
    unit: str = ""
    least: float | None = None
    below: float | None = None
    or_all: bool = False  # -1 is allowed, and means all
    choices: tuple[str, ...] = ()
    default_text: str = ""  # where the default is None
    only_yaml: bool = False
    may_change: bool = False  # from one start of a run to the next
    parse: Callable[[str], Any] | None = None  # of an argument, in place of the type


@dataclass(frozen=True)
class Option:
    """An option of a dataclass."""

    name: str  # of the field, and the key of a YAML file
    kind: Any  # type of its values other than None, or Any
    default: Any
    spec: _Spec

    @property
    def flag(self) -> str:
        """How it is given: as an argument, or as a key of a YAML file."""
        return self.name if self.spec.only_yaml else "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        """Its meaning and its default."""
        shown = "off" if self.default is False else f"{self.default} {self.spec.unit}".strip()
        return f"{self.spec.help} Default: {self.spec.default_text or shown}."

    def check(self, value: Any) -> None:
        """Refuse a value of another type or out of range.

        Raises:
            InputError: the message has the option, the value and what is allowed.
        """
        spec, kind = self.spec, self.kind
        if kind is Any or (value is None and self.default is None):
            return
        fits = isinstance(value, (int, float) if kind is float else kind)
        fits = fits and isinstance(value, bool) == (kind is bool)
        if kind is float:
            fits = fits and abs(value) <= sys.float_info.max
        if kind is list:
            fits = fits and all(type(part) is int for part in value) and len(value) <= _LONGEST
        if not fits:
            raise InputError(f"{self.flag} must be {_KINDS[kind]}, got {shown(value)}.")
        if spec.choices and value not in spec.choices:
            raise InputError(
                f"{self.flag} must be one of {', '.join(spec.choices)}, got {shown(value)}."
            )
        enough = spec.least is None or value >= spec.least or (spec.or_all and value == -1)
        if not (enough and (spec.below is None or value < spec.below)):
            below = "" if spec.below is None else f" and below {spec.below}"
            or_all = ", or -1 for all" if spec.or_all else ""
            raise InputError(
                f"{self.flag} must be at least {spec.least}{below}{or_all}, got {shown(value)}."
            )


def option(default: Any, group: str, text: str, **more: Any) -> Any:
    """A field of a dataclass that is an option; `more` are fields of `_Spec`."""
    spec = {"spec": _Spec(group=group, help=text, **more)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=spec)
    return field(default=default, metadata=spec)


def options_of(kind: type) -> list[Option]:
    """The options of a dataclass, in order."""
    hints = get_type_hints(kind)
    found = []
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if NoneType in get_args(hint):
            hint = next(inner for inner in get_args(hint) if inner is not NoneType)
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        spec = item.metadata["spec"]
        found.append(Option(item.name, get_origin(hint) or hint, default, spec))
    return found


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add -c and an argument for each option, in groups; None where it is not given."""
    groups: dict[str, Any] = {}
    for item in options_of(kind):
        spec = item.spec
        if spec.group not in groups:
            groups[spec.group] = parser.add_argument_group(spec.group)
        group = groups[spec.group]
        if spec.only_yaml:
            line = f"{item.name}: {item.help}"
            wrapped = textwrap.fill(line, 90, initial_indent="  ", subsequent_indent="      ")
            group.description = f"{group.description or 'in a YAML file only:'}\n{wrapped}"
            continue
        settings: dict[str, Any] = {"help": item.help, "default": None}
        if item.kind is bool:
            settings["action"] = "store_true"
        elif item.kind is list:
            settings |= {"type": int, "nargs": "+", "metavar": "TOKENS"}
        elif spec.choices:
            settings["choices"] = spec.choices
        else:
            settings["type"] = spec.parse or item.kind
            settings["metavar"] = {int: "N", float: "X"}.get(item.kind)
        group.add_argument(item.flag, **settings)
    parser.add_argument(
        "-c",
        "--config",
        help="A YAML file of options, such as those of mlx_lm.lora; arguments win over it.",
    )


def with_config(args: argparse.Namespace, kind: type) -> argparse.Namespace:
    """Fill in from the YAML file of --config what the arguments leave open.

    Raises:
        InputError: the file cannot be read, or has a key that no option has.
    """
    if not args.config:
        return args
    with reading(f"--config {args.config} cannot be read"):
        with open_regular(Path(args.config)) as file:
            text = file.read(_LARGEST_CONFIG)
        values = yaml.load(text.decode("utf-8"), yaml_loader) or {}  # noqa: S506 - a SafeLoader
    if not isinstance(values, dict):
        raise InputError(f"--config {args.config} must be a list of `key: value` lines.")
    known = sorted((vars(args).keys() | {item.name for item in options_of(kind)}) - {"config"})
    for key in values:
        if key not in known:
            raise InputError(
                f"--config {args.config} has the key {shown(key)}, which is none of: "
                f"{', '.join(known)}."
            )
    for item in options_of(kind):
        if item.spec.parse and isinstance(values.get(item.name), str):
            try:
                values[item.name] = item.spec.parse(values[item.name])
            except argparse.ArgumentTypeError as error:
                raise InputError(f"{item.flag} {error}.") from error
    given = {key: value for key, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | values | given)
