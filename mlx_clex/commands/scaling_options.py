"""Add --scaling NAME and the settings of the methods as command-line options.

The options are the fields of the methods' `Config` dataclasses, so a new method adds its options
here without a change.

Not covered: ranges, which the dataclasses check.
"""

import argparse
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from ..errors import InputError, shown
from ..scaling import SCALINGS


def add_scaling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --scaling and one option for each field of any method.

    An option that is not given is None in the namespace.
    """
    group = parser.add_argument_group("position scaling")
    group.add_argument(
        "--scaling",
        choices=list(SCALINGS),
        metavar="NAME",
        help=f"Switch on a scaling: {', '.join(SCALINGS)}.",
    )
    owners: dict[str, list[str]] = {}
    kinds: dict[str, type] = {}
    meanings: dict[str, str] = {}
    for method, field, kind in _fields():
        owners.setdefault(field.name, []).append(f"{method} {_default(field)}")
        kinds[field.name] = kind
        meanings.setdefault(field.name, field.metadata["help"])
    for name, kind in kinds.items():
        option = "--" + name.replace("_", "-")
        # No argparse default: the default of a field depends on the method.
        text = f"{meanings[name]} Default: {', '.join(owners[name])}."
        if kind is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(option, type=kind, help=text)


def scaling_from(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the rope_scaling entry that the options ask for, or None without --scaling.

    Raises:
        InputError: an option that the method does not have, or options without --scaling.
    """
    given = {
        field.name: value
        for _, field, _ in _fields()
        if (value := getattr(args, field.name, None)) is not None
    }
    options = ", ".join("--" + name.replace("_", "-") for name in given)
    if args.scaling is None:
        if given:
            raise InputError(f"{options} needs --scaling, one of {', '.join(SCALINGS)}.")
        return None
    if not isinstance(args.scaling, str) or args.scaling not in SCALINGS:  # from a YAML file
        raise InputError(
            f"--scaling must be one of {', '.join(SCALINGS)}, got {shown(args.scaling)}."
        )
    known = [field.name for method, field, _ in _fields() if method == args.scaling]
    for name in given:
        if name not in known:
            listed = ", ".join("--" + key.replace("_", "-") for key in known)
            raise InputError(
                f"--scaling {args.scaling} has no --{name.replace('_', '-')}. "
                f"It has: {listed or 'no options'}."
            )
    return {"type": args.scaling, **given}


def _fields() -> Iterator[tuple[str, Field, type]]:
    """Yield (method, field, type of the option) for every field with an effect."""
    for method, scaling in SCALINGS.items():
        types = get_type_hints(scaling.Config)
        for field in fields(scaling.Config):
            if not field.metadata["help"]:
                continue
            kinds = [t for t in get_args(types[field.name]) if t is not NoneType]
            yield method, field, kinds[0] if kinds else types[field.name]


def _default(field: Field) -> str:
    return "none" if field.default is MISSING or field.default is None else str(field.default)
