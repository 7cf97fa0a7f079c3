"""Decide what a conversion writes, before anything is written.

The family's mlx-lm model, with the scaling attached, defines the names and shapes of the
tensors; its `sanitize` maps the names of the source. All arrays stay lazy: each tensor is cast
and quantised when the output writes it.
"""

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_clex.checkpoint.config import (
    BASE_ROPE,
    OURS,
    base_config,
    is_ours,
    normalise_config,
    read_by_transformers,
    set_tied,
)
from mlx_clex.checkpoint.folder import SHIM
from mlx_clex.checkpoint.safetensors_file import info_of
from mlx_clex.checkpoint.sizes import Held
from mlx_clex.checkpoint.tensor_names import Renaming, rename
from mlx_clex.errors import InputError, reading, shown
from mlx_clex.model.own_rope import (
    check_trained_length,
    dropped_rope,
    ignores_own_rope,
    original_length,
    own_entry,
    plain_rope,
    without_own_rope,
)
from mlx_clex.model_file import Model, ModelArgs, head_name
from mlx_clex.scaling import PREFIX, SCALINGS, Scaling
from mlx_clex.scaling.config import parse_config

from .freeze.stock_rope import check_names, frozen_config
from .options import DTYPES, Options
from .write.precision import cast_and_quantize, quantize_like_source


@dataclass
class Outcome:
    """Config, tensors and notes of the folder that a conversion writes."""

    config: dict[str, Any]
    tensors: dict[str, mx.array]  # lazy, in the order of writing; the writer empties it
    unquantised: dict[str, mx.array]  # lazy; what -q makes the tensors of the same names from
    scaling: Scaling | None  # None where the checkpoint has no mlx_clex scaling
    method: str  # name of the scaling
    reach: int  # tokens, for the tokenizer
    renaming: Renaming
    notes: list[str]  # lines to print for the user
    file_format: str = "mlx"  # `format` in the metadata of the weight files

    @property
    def nbytes(self) -> int:
        """Size of the weights to be written, in bytes."""
        return sum(array.nbytes for array in self.tensors.values())


def decide_outcome(
    config: dict[str, Any], weights: dict[str, mx.array], options: Options
) -> Outcome:
    """Decide names, types and config of the converted checkpoint.

    Args:
        config: config.json as published.
        weights: the source's tensors, lazy; they may be stand-ins of the right shape.
        options: what the user asked for.

    Raises:
        InputError: a tensor is missing, extra or of the wrong shape, or the config or an
            option cannot be used; the message names it.
    """
    notes: list[str] = []
    renaming = rename(weights)
    held = Held.of(info_of(array) for array in weights.values())
    packed = any(not mx.issubdtype(array.dtype, mx.floating) for array in weights.values())
    config = _config(config, held, options, notes, packed=packed)
    name = head_name(config, {name: array.shape for name, array in weights.items()}, held)
    if name is None:
        set_tied(config, has_head=False, same=False)
    else:
        head = weights[name]
        alike = [a for n, a in weights.items() if n != name and a.shape == head.shape]
        same = any(_equal(head, array) for array in alike)
        set_tied(config, has_head=True, same=same)
    ours = scaling_weights(weights, renaming)
    if ours and options.scaling is not None:
        raise InputError(
            f"The checkpoint already has trained weights of a scaling ({', '.join(ours)}). "
            "--scaling would discard them: leave it out."
        )
    model = _build_model(config, held)
    scaling: Scaling | None = getattr(model, "scaling", None)
    if scaling is not None and (ours or options.scaling is None):
        scaling.take_weights(ours)
    published = {name: weights[name] for name in renaming.kept if not name.startswith(PREFIX)}
    # A copy: mlx-lm's sanitize may change the dict that it gets.
    rest = _sanitize(model, dict(published))
    quantize_like_source(model, config, rest)
    expected = {name: array.shape for name, array in _flat(model) if not name.startswith(PREFIX)}
    _compare(expected, rest)
    model.load_weights(list(rest.items()), strict=False)
    config, unquantised = cast_and_quantize(model, config, options, notes)
    method = (config.get("rope_scaling") or {"type": "none"})["type"]
    # A scaling without learned tensors is an empty module, and so false.
    own = scaling.reach if scaling is not None else None
    reach = own or config["max_position_embeddings"]
    if options.freeze is not None:
        if scaling is None:
            raise InputError("--freeze: the checkpoint has no mlx_clex scaling; add --scaling.")
        config, reach = frozen_config(config, scaling, options.freeze, options.freeze_for)
    elif scaling is None:
        config = normalise_config(config)
    else:
        config = with_entry(config, scaling.entry())
    tensors = _in_source_order(model, list(rest))
    if options.freeze is not None:
        tensors = {k: v for k, v in tensors.items() if not k.startswith(PREFIX)}
    if options.for_transformers:
        tensors = _published_names(published, rest, tensors, config)
    # Written tensors would stay in memory while the model holds them.
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    del model, rest, published, weights
    gc.collect()
    file_format = "pt" if options.for_transformers else "mlx"
    return Outcome(
        config, tensors, unquantised, scaling, method, reach, renaming, notes, file_format
    )


def _config(
    config: dict[str, Any], held: Held, options: Options, notes: list[str], packed: bool = False
) -> dict[str, Any]:
    """Return the normalised config with the user's options applied.

    Args:
        config: config.json as published.
        held: what the weight files hold.
        options: what the user asked for.
        notes: lines for the user; added to.
        packed: whether some tensors are whole numbers, as quantised weights are.
    """
    config = normalise_config(config)
    if options.scaling is not None:
        _set_scaling(config, held, options.scaling, options.own_rope, notes)
    if options.trained_length is not None:
        check_trained_length(base_config(config), options.trained_length)
        config["max_position_embeddings"] = options.trained_length
    text = config.get("text_config")
    if isinstance(text, dict) and "max_position_embeddings" in text:
        config.setdefault("max_position_embeddings", text["max_position_embeddings"])
    if "max_position_embeddings" not in config:
        raise InputError(
            "config.json does not have the trained length (max_position_embeddings): pass "
            "--trained-length, in tokens."
        )
    if config["model_type"] == "mixtral" and config.get("sliding_window"):
        notes.append(
            f"sliding_window {config['sliding_window']} is set to null: it would cut off "
            "the text past the trained length."
        )
        config["sliding_window"] = None
    foreign = config.get("quantization_config")
    if foreign and "quantization" not in config and not packed:
        del config["quantization_config"]  # it tells how the weights were before
    elif foreign and "quantization" not in config:
        method = foreign.get("quant_method") if isinstance(foreign, dict) else foreign
        raise InputError(
            f"The checkpoint is quantised with {method!r}, which mlx_clex does not read. Use the "
            "unquantised checkpoint, or convert it with mlx_lm.convert first."
        )
    return config


def _set_scaling(
    config: dict[str, Any],
    held: Held,
    scaling: Mapping[str, Any],
    own_rope: str | None,
    notes: list[str],
) -> None:
    """Set the scaling in the config; keep or drop the rope of the source."""
    before = config.get("rope_scaling")
    if before is not None and is_ours(config, before["type"]):
        if before["type"] != scaling.get("type"):
            notes.append(
                f"--scaling {scaling.get('type')} replaces the scaling of the source, "
                f"{before['type']}."
            )
        before = config.get(BASE_ROPE)
    source = {**config, "rope_scaling": before, "model_file": None}
    entry = own_entry(source)
    if own_rope is not None and entry is None:
        raise plain_rope(own_rope)
    if entry is not None:
        kind = entry.get("type") or entry.get("rope_type")
        ignored = own_rope != "drop" and ignores_own_rope(_build_model(source, held), source)
        if ignored or own_rope == "drop":
            config.update(without_own_rope(source))
            before, length = config["rope_scaling"], original_length(source)
            config["max_position_embeddings"] = length
            notes.append(
                f"mlx-lm ignores the source's own rope ({kind}), so the base is its plain rope, "
                f"trained at {length:,} tokens."
                if ignored
                else str(dropped_rope(source))
            )
        else:
            notes.append(f"The source's own rope ({kind}) is the base; at scale 1 it is unchanged.")
    config.pop(BASE_ROPE, None)
    if before is not None:
        config[BASE_ROPE] = before
    config["rope_scaling"] = _in_full(scaling)
    config["model_file"] = SHIM


def _in_full(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rope_scaling entry with every default written out.

    Keys missing in a published config.json take the values of the first releases (CLEX: silu,
    log_scale). Options that the user leaves out take the defaults of mlx_clex.
    """
    name = scaling.get("type")
    if name not in SCALINGS:
        raise InputError(f"There is no scaling {name!r}. Use one of: {', '.join(SCALINGS)}.")
    return {"type": name, **asdict(parse_config(SCALINGS[name].Config, scaling))}


def _equal(one: mx.array, other: mx.array, rows: int = 4096) -> bool:
    """Return whether two tensors of a shape are equal; few rows of them are compared at a time."""
    return all(
        bool(mx.array_equal(one[i : i + rows], other[i : i + rows]))
        for i in range(0, len(one), rows)
    )


def scaling_weights(weights: Mapping[str, mx.array], renaming: Renaming) -> dict[str, mx.array]:
    """Return the learned tensors of a checkpoint's scaling by our names, in float32, lazy.

    Raises:
        InputError: the shapes of the layers differ.
    """
    found = {name: weights[name] for name in renaming.kept if name.startswith(PREFIX)}
    for name, sources in renaming.scaling.items():
        arrays = [weights[source] for source in sources]
        if not renaming.naming.per_layer:
            found[name] = arrays[0]
        elif len({array.shape for array in arrays}) == 1:
            found[name] = mx.stack(arrays)
        else:
            raise InputError(f"The tensors of the layers for {name} differ in shape.")
    return {name: array.astype(mx.float32) for name, array in found.items()}


def _build_model(config: dict[str, Any], held: Held) -> Any:
    family = shown(config["model_type"])
    with reading(f"config.json does not describe a model that mlx-lm can build ({family})"):
        return Model(ModelArgs.from_dict(config), held=held)


def _sanitize(model: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    with reading("The tensors do not fit together"):
        try:
            return dict(model.sanitize(weights)) if hasattr(model, "sanitize") else weights
        except KeyError as error:
            raise InputError(f"The checkpoint lacks the tensor {error.args[0]}.") from error


def _compare(expected: Mapping[str, Any], given: Mapping[str, mx.array]) -> None:
    for name in expected:
        if name not in given:
            more = len(expected.keys() - given.keys()) - 1
            raise InputError(
                f"The checkpoint lacks the tensor {name}, shape {tuple(expected[name])}"
                + (f", and {more} more" if more else "")
                + ". Is a shard missing, or is it another model's config.json?"
            )
    for name, array in given.items():
        if name not in expected:
            raise InputError(
                f"The checkpoint has the tensor {name}, shape {tuple(array.shape)}, which its "
                "model does not have. Is it another model's config.json?"
            )
        if mx.issubdtype(array.dtype, mx.signedinteger) or array.dtype == mx.bool_:
            raise InputError(
                f"The tensor {name} has the type {str(array.dtype).removeprefix('mlx.core.')}. "
                "Weights are floats. Download the checkpoint again."
            )
        if tuple(array.shape) != tuple(expected[name]):
            raise InputError(
                f"The tensor {name} has shape {tuple(array.shape)}; the config asks for "
                f"{tuple(expected[name])}."
            )


def with_entry(config: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a converted checkpoint, which transformers reads as well.

    Args:
        config: the config of the model, normalised.
        entry: its scaling (`Scaling.entry`).

    Returns:
        The config with the entry under `rope_scaling`, or under a key of mlx_clex where the
        config class of transformers refuses it.
    """
    written = {**config, "rope_scaling": dict(entry), "model_file": SHIM}
    if read_by_transformers(written) is None:
        written[OURS] = written.pop("rope_scaling")
    return written


def _published_names(
    published: Mapping[str, mx.array],
    rest: Mapping[str, mx.array],
    tensors: Mapping[str, mx.array],
    config: Mapping[str, Any],
) -> dict[str, mx.array]:
    """Return the source's tensors under transformers' names, not quantised.

    Args:
        published: the tensors of the source.
        rest: the same after mlx-lm's `sanitize`.
        tensors: the tensors of the model, cast and not quantised.
        config: the new config; its torch_dtype is the type of the tensors.
    """
    if "quantization" in config:
        raise InputError("--for transformers cannot take MLX's quantised weights: add -d.")
    found = dict(published)
    packed = [name.removesuffix(".scales") for name in published if name.endswith(".scales")]
    for layer in packed:
        if f"{layer}.weight" in tensors:
            found[f"{layer}.weight"] = tensors[f"{layer}.weight"]
            del found[f"{layer}.scales"]
            found.pop(f"{layer}.biases", None)
    # Names that sanitize leaves as they are may be MLX's own.
    if packed or rest.keys() <= published.keys():
        check_names(config, {name: a for name, a in found.items() if packed or name in rest})
    if config.get("torch_dtype") not in DTYPES:
        return found
    dtype = getattr(mx, config["torch_dtype"])
    # Some families keep the type of a few tensors.
    types = {name: array.dtype for name, array in tensors.items()}
    return {name: array.astype(types.get(name, dtype)) for name, array in found.items()}


def _in_source_order(model: nn.Module, order: list[str]) -> dict[str, mx.array]:
    """Return the model's tensors in the order of the source files, so that few stay open."""
    rank = {name.rpartition(".")[0]: index for index, name in enumerate(order)}
    return dict(sorted(_flat(model), key=lambda item: rank.get(item[0].rpartition(".")[0], -1)))


def _flat(model: nn.Module) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
