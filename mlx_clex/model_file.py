"""The model classes that the `model_file` of a converted checkpoint imports.

mlx-lm calls `ModelArgs.from_dict(config)` and then `Model(args)`. `ModelArgs` holds the config;
`Model` builds the stock model of the family named by `model_type` and attaches the scaling.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.utils import _get_classes as get_stock_classes

from .checkpoint.config import BASE_ROPE, is_ours, normalise_config
from .errors import InputError
from .model.own_rope import build_plain
from .model.scaled_model import attach
from .model.stock import keep_config
from .scaling import SCALINGS

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


def Model(args: ModelArgs, scale: float | None = None) -> nn.Module:  # noqa: N802 - mlx-lm's name
    """Return the stock model of the family with the config's scaling attached.

    mlx-lm handles a config without rope_scaling, and types that only mlx-lm has (llama3,
    longrope, ...).

    Args:
        args: the config.
        scale: a fixed scale; None: the scale follows the length of the text.

    Raises:
        InputError: the config has an unknown value or one out of range.
    """
    config = args.config
    rope_scaling = config.get("rope_scaling")
    ours = rope_scaling is not None and is_ours(config, rope_scaling["type"])
    if rope_scaling is not None and not ours and not _known_to_mlx_lm(rope_scaling):
        raise InputError(
            f"config.json asks for rope_scaling type {rope_scaling['type']!r}, which neither "
            f"mlx_clex nor mlx-lm has. mlx_clex has: {', '.join(SCALINGS)}."
        )
    try:
        model_class, args_class = get_stock_classes(config)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"mlx-lm has no model for model_type {config.get('model_type')!r} of config.json."
        ) from error
    # The stock class must get the base rope, not a scaling of mlx_clex.
    stock_config = {**config, "rope_scaling": config.get(BASE_ROPE) if ours else rope_scaling}

    def build(config: dict[str, Any]) -> nn.Module:
        return model_class(args_class.from_dict(config))

    plain = stock_config["rope_scaling"] is None
    model = build_plain(build, stock_config) if plain else build(stock_config)
    keep_config(model, stock_config)
    if rope_scaling is None or not ours:
        return model
    length = config.get("max_position_embeddings")
    return attach(model, rope_scaling, trained_length=length, scale=scale)


def _known_to_mlx_lm(rope_scaling: Mapping[str, Any]) -> bool:
    try:
        initialize_rope(4, 10_000.0, False, dict(rope_scaling), 2048)
    except ValueError as error:
        return "Unsupported RoPE type" not in str(error)
    except KeyError:
        return True  # the type is known; the model class reports the missing key
    return True
