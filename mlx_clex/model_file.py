"""The model classes that the `model_file` of a converted checkpoint imports.

mlx-lm calls `ModelArgs.from_dict(config)` and then `Model(args)`. `ModelArgs` holds the config;
`Model` builds the stock model of the family named by `model_type` and attaches the scaling.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.utils import _get_classes as get_stock_classes
from mlx_lm.utils import load_model

from .checkpoint.config import BASE_ROPE, is_ours, normalise_config, set_tied
from .checkpoint.digest import samples_by_name
from .checkpoint.folder import SHIM, Headers, headers_of, held_by, read_config
from .checkpoint.sizes import Held, build_within
from .errors import InputError, reading, shown
from .model.own_rope import build_plain
from .model.scaled_model import attach
from .model.stock import keep_config
from .scaling import SCALINGS

_HEAD = "lm_head.weight"  # the output head in the files of most families

# No `from __future__ import annotations` in this file: mlx-lm executes the importing
# file without registering it in sys.modules, where dataclasses would look types up.


@dataclasses.dataclass
class ModelArgs:
    """The whole config.json of a checkpoint with a scaling, normalised."""

    config: dict[str, Any]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """Return the args for a parsed config.json."""
        return cls(normalise_config(dict(config)))


def Model(  # noqa: N802 - mlx-lm's name
    args: ModelArgs, scale: float | None = None, held: Held | None = None
) -> nn.Module:
    """Return the stock model of the family with the config's scaling attached.

    mlx-lm handles a config without rope_scaling, and types that only mlx-lm has (llama3,
    longrope, ...).

    Args:
        args: the config.
        scale: a fixed scale; None: the scale follows the length of the text.
        held: what the weight files hold; None: not known, and not checked.

    Raises:
        InputError: the config has an unknown value or one out of range, or describes a larger
            model than the files can hold.
    """
    config = args.config
    rope_scaling = config.get("rope_scaling")
    ours = rope_scaling is not None and is_ours(config, rope_scaling["type"])
    if rope_scaling is not None and not ours and not _known_to_mlx_lm(rope_scaling):
        raise InputError(
            f"config.json asks for rope_scaling type {rope_scaling['type']!r}, which neither "
            f"mlx_clex nor mlx-lm has. mlx_clex has: {', '.join(SCALINGS)}."
        )
    family = shown(config.get("model_type"))
    with reading(f"mlx-lm has no model for model_type {family} of config.json"):
        model_class, args_class = get_stock_classes(config)
    # The stock class must get the base rope, not a scaling of mlx_clex.
    stock_config = {**config, "rope_scaling": config.get(BASE_ROPE) if ours else rope_scaling}

    def build(config: dict[str, Any]) -> nn.Module:
        return model_class(args_class.from_dict(config))

    def build_stock() -> nn.Module:
        if stock_config["rope_scaling"] is None:
            return build_plain(build, stock_config)
        return build(stock_config)

    model = build_stock() if held is None else build_within(held, build_stock)
    keep_config(model, stock_config)
    if rope_scaling is None or not ours:
        return model
    length = config.get("max_position_embeddings")
    return attach(model, rope_scaling, trained_length=length, scale=scale)


def open_model(
    folder: Path,
    *,
    scale: float | None = None,
    model_config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a folder and its config; weights are read when they are first needed.

    Args:
        folder: the checkpoint, converted or not. The copy of this module in it is not run.
        scale: as in `Model`.
        model_config: keys that replace those of config.json.
        trust_remote_code: let mlx-lm run a model file of the folder.

    Raises:
        InputError: as in `Model`. mlx-lm raises other types for files that it cannot read.
    """
    written, headers = read_config(folder), headers_of(folder)
    held = held_by(headers, written)
    overrides = _tied_override(headers, written, held) | dict(model_config or {})
    ours = written.get("model_file") == SHIM
    if ours:
        overrides["model_file"] = None
    make = functools.partial(Model, scale=scale, held=held)

    class Args(ModelArgs):
        @classmethod
        def from_dict(cls, config: Mapping[str, Any]) -> ModelArgs:
            return ModelArgs.from_dict({**config, "model_file": SHIM} if ours else config)

    return load_model(
        folder,
        lazy=True,
        model_config=overrides,
        get_model_classes=lambda config: (make, Args),
        trust_remote_code=trust_remote_code,
    )


def head_name(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], held: Held
) -> str | None:
    """Return the name of the output head in the files of a model, or None if they have none.

    Args:
        config: config.json.
        shapes: shapes of the tensors in the files, by name.
        held: what the files hold.
    """
    if _HEAD in shapes:
        return _HEAD
    # A head under another name has a row for each token, as the embedding has.
    rows = config.get("vocab_size")
    wide = {name for name, shape in shapes.items() if shape and shape[0] == rows}
    if sum(name.endswith(".weight") for name in wide) < 2:
        return None
    names = []
    for tied in (False, True):
        args = ModelArgs.from_dict({**config, "tie_word_embeddings": tied})
        try:
            flat: Any = tree_flatten(Model(args, held=held).parameters())
        except Exception:  # building the model itself says what is wrong
            return None
        names.append({name for name, _ in flat})
    untied, both = names
    return next(iter(wide & (untied - both)), None)


def _tied_override(headers: Headers, config: Mapping[str, Any], held: Held) -> dict[str, bool]:
    """Return tie_word_embeddings where the weights of a folder decide it, else nothing."""
    shapes = {name: info.shape for header in headers.values() for name, info in header.items()}
    name = head_name(config, shapes, held)
    if name is None or name.replace(".weight", ".scales") in shapes:
        return {}
    alike = tuple(other for other, shape in shapes.items() if shape == shapes[name])
    samples = samples_by_name(headers, alike)
    head = samples.pop(name)
    tied = dict(config)
    set_tied(tied, has_head=True, same=head in samples.values())
    return {"tie_word_embeddings": tied["tie_word_embeddings"]}


def _known_to_mlx_lm(rope_scaling: Mapping[str, Any]) -> bool:
    try:
        initialize_rope(4, 10_000.0, False, dict(rope_scaling), 2048)
    except ValueError as error:
        return "Unsupported RoPE type" not in str(error)
    except KeyError:
        return True  # the type is known; the model class reports the missing key
    return True
