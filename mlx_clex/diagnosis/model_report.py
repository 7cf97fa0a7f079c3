"""Describe a model for `doctor`: rope, scaling, reach, memory, exports and problems.

Everything comes out of config.json, the headers and sizes of the files and the scaling's tensors.
The model is built, but MLX is lazy: its weights are neither read nor made up, so a model of any
size takes seconds.

Not covered: whether the weights match the config, which loading checks.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..checkpoint.config import base_config, normalise_config
from ..checkpoint.files import read_json
from ..checkpoint.folder import (
    SHIM,
    check_hub_id,
    files_of,
    held_by,
    needs_conversion,
    read_config,
)
from ..checkpoint.sizes import Held
from ..checkpoint.unread import unread_settings
from ..errors import InputError, one_line
from ..model.find_ropes import Site, find_sites
from ..model.own_rope import length_of, original_length, own_entry
from ..model.plans import single_caches
from ..model.scaled_model import ScaledModel, attach, make_prompt_cache
from ..model.stock import model_name
from ..model_file import Model, ModelArgs
from ..scaling import PREFIX, SCALINGS, Scaling
from ..scaling.check import check_frequencies

Row = tuple[str, str]

_KV_BITS = (8, 4)
_KV_GROUP = 64  # cached values that share a scale and a bias of 16 bits each
_PROBLEM = "problem"


def report(path_or_hub_id: str) -> list[Row]:
    """Return rows that describe a model and what can be done with it.

    Args:
        path_or_hub_id: a folder, a .gguf file or a Hugging Face id. Only config.json is
            downloaded.

    Returns:
        (name, text) rows to print. A row named "problem" says what would fail.

    Raises:
        InputError: the model is not found, or has no readable config.json.
    """
    path = Path(path_or_hub_id).expanduser()
    config, held, rows = _find(path_or_hub_id)
    try:
        if held is None:
            held = _held_by(path)
        model = Model(ModelArgs.from_dict(config), held=held)
        config = normalise_config(config)
    except InputError as error:
        return [*rows, (_PROBLEM, str(error))]
    except Exception as error:  # model files raise anything on settings they do not take
        return [*rows, (_PROBLEM, f"config.json does not make a model: {one_line(error)}")]
    rows += [(_PROBLEM, note) for note in unread_settings(base_config(config), model)]
    rows.append(("family", f"{config.get('model_type')} ({model_name(model)})"))
    if isinstance(model, ScaledModel):
        rows += _curve(path, config, model.scaling)
        _stand_in(model)
        return [
            *rows,
            *_ropes(model, find_sites(model)),
            *_scaling(model),
            *_exports(model, config),
        ]
    return [*rows, *_without_scaling(model, config)]


def _find(path_or_hub_id: str) -> tuple[dict[str, Any], Held | None, list[Row]]:
    """Return the config of a model, what its files can hold, and rows about them.

    For a folder the second is None: its files may be broken, which is a problem to report.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from ..convert.read.gguf_file import config_of, header, read

        gguf = read(path)
        size = f"{_size(path.stat().st_size)}, .gguf: load converts it once"
        rows = [("model", str(path)), ("weights", size)]
        return config_of(gguf), Held.of(header(gguf).values()), rows
    if path.is_dir():
        config = read_config(path)
        return config, None, [("model", str(path)), *_files(path, config)]
    path_or_hub_id = check_hub_id(path_or_hub_id)
    from huggingface_hub import hf_hub_download

    from ..convert.read.hub import guarded, look_up

    listing = look_up(path_or_hub_id)
    file = listing.config or guarded(
        path_or_hub_id, None, lambda: Path(hf_hub_download(path_or_hub_id, "config.json"))
    )
    size = sum(listing.sizes.values())
    rows = [("model", f"{path_or_hub_id} (on the hub)"), ("download", _size(size))]
    return read_config(file.parent), Held.in_bytes(size), rows


def _held_by(folder: Path) -> Held:
    from ..convert.read.torch_pickle import read_tensors

    files = files_of(folder)
    bins = [file for file in files if file.suffix == ".bin"]
    if bins and not any(file.suffix == ".safetensors" for file in files):
        return Held.of(tensor.info for file in bins for tensor in read_tensors(file).values())
    return held_by(folder)


def _files(folder: Path, config: dict[str, Any]) -> Iterator[Row]:
    names = [file.name for file in files_of(folder)]
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    try:
        published = needs_conversion(names, config, folder)
    except InputError as error:
        yield _PROBLEM, str(error)
        return
    kind = "mlx-lm reads them as they are"
    if config.get("model_file") == SHIM:
        kind = "converted by mlx_clex"
    elif published:
        kind = "a published checkpoint: load converts it once"
    size = sum((folder / name).stat().st_size for name in weights)
    yield "weights", f"{_size(size)} in {len(weights)} files, {kind}"
    for index in sorted(folder.glob("*.index.json")):
        try:
            wanted = set(read_json(index)["weight_map"].values())
        except (InputError, KeyError, AttributeError, TypeError):
            yield _PROBLEM, f"{index.name} is not a readable index of weights. Copy it again."
            continue
        for name in sorted(wanted - set(names)):
            yield _PROBLEM, f"{index.name} lists {name}, which is missing. Download it again."
    if not any(name.startswith(("tokenizer.", "vocab.")) for name in names):
        yield _PROBLEM, "No tokenizer. Copy the tokenizer files of the base model here."


def _ropes(model: nn.Module, sites: list[Site]) -> Iterator[Row]:
    first = sites[0]
    rope, heads = first.rope, first.heads
    names = sorted({site.name for site in sites})
    yield "heads", f"{heads} query, {first.key_heads} key"
    pairs = "neighbouring dimensions" if rope.traditional else "halves"
    yield (
        "rope",
        f"{', '.join(names)} in {len(sites)} of {len(model.layers)} layers; "
        f"{2 * rope.pairs} dimensions rotate as pairs of {pairs}, base {rope.base:g}"
        + ("" if rope.inv_freq is None else ", stretched by a rope_scaling of the model itself"),
    )
    if len(sites) < len(model.layers):
        yield "other layers", "keep their own rope, window or state"
    if first.unmovable:
        yield "note", f"supports only a fixed scale: {first.unmovable}"
    if first.ungainable:
        yield "note", f"does not support log_scale: {first.ungainable}"


def _curve(folder: Path, config: dict[str, Any], scaling: Scaling) -> Iterator[Row]:
    """What is wrong with the learned frequencies of a converted folder."""
    if not scaling.learned or config.get("model_file") != SHIM:
        return
    learned: dict[str, mx.array] = {}
    try:
        for file in sorted(folder.glob("model*.safetensors")):
            loaded: Any = mx.load(str(file))
            learned |= {name: array for name, array in loaded.items() if name.startswith(PREFIX)}
        scaling.take_weights(learned)
        message = check_frequencies(scaling, strict=True)
    except (InputError, RuntimeError, ValueError) as error:
        message = one_line(error)
    if message is not None:
        yield _PROBLEM, message


def _stand_in(model: Any) -> None:
    """Fill the learned tensors with random numbers.

    A fresh scaling is a special case that more programs can express than a trained one.
    """
    for index, name in enumerate(model.scaling.learned):
        shape = model.scaling[name].shape
        model.scaling[name] = mx.random.normal(shape, key=mx.random.key(index)) / model.scaling.dims


def _scaling(model: Any) -> Iterator[Row]:
    scaling = model.scaling
    name = scaling.name
    options = ", ".join(
        f"{f.name} {getattr(scaling.config, f.name)}" for f in fields(scaling.config)
    )
    yield "trained length", f"{scaling.trained_length} tokens"
    yield "scaling", f"{name}{f' ({options})' if options else ''}"
    if scaling.reach is None:
        yield "reach", "any length; memory and quality decide"
    elif scaling.hard_reach:
        yield "reach", f"{scaling.reach} tokens; longer texts are refused"
    elif scaling.grows:
        yield "reach", f"{scaling.reach} tokens; past it the scale grows with the text"
    else:
        yield "reach", f"{scaling.reach} tokens; past it answers get worse"
    yield from _memory(model, scaling.reach or scaling.trained_length)


def _memory(model: nn.Module, length: int) -> Iterator[Row]:
    growing, rest, groups = _cached_values(model, length)
    texts = [f"{_size(2 * (growing + rest))} in 16 bits"]
    for bits in _KV_BITS if groups else ():
        quantised = growing * (bits / 8 + 4 / _KV_GROUP) + 2 * rest
        texts.append(f"{_size(quantised)} with --kv-bits {bits}")
    texts.append(f"{_size(4 * (growing + rest))} in float32")
    yield "KV cache", f"at {length} tokens: {', '.join(texts)}"
    memory = mx.device_info().get("max_recommended_working_set_size")
    if isinstance(memory, int) and 2 * (growing + rest) > memory:
        yield (
            _PROBLEM,
            f"The KV cache of {length} tokens is larger than the {_size(memory)} that MLX can use "
            "on this device. Read shorter texts, or use --kv-bits 4.",
        )


def _cached_values(model: nn.Module, length: int) -> tuple[int, int, bool]:
    """Return the size of the caches at a length.

    Returns:
        (values in growing caches, values in other caches, whether --kv-bits can be used).
    """
    caches = make_prompt_cache(model)
    model(mx.array([[0, 1]]), cache=caches)
    growing = rest = 0
    groups = True
    for cache in single_caches(caches):
        flat: Any = tree_flatten(cache.state)
        arrays = [a for _, a in flat if isinstance(a, mx.array)]
        if isinstance(cache, KVCache | RotatingKVCache):
            kept = min(length, getattr(cache, "max_size", None) or length)
            values = sum(
                kept * math.prod((*a.shape[:2], a.shape[3])) for a in arrays if a.ndim == 4
            )
            if isinstance(cache, KVCache):
                growing += values
                groups = groups and all(a.shape[-1] % _KV_GROUP == 0 for a in arrays if a.ndim == 4)
            else:
                rest += values
        else:
            rest += sum(a.size for a in arrays)
    return growing, rest, groups


def _exports(model: Any, config: dict[str, Any]) -> Iterator[Row]:
    from ..convert.freeze.stock_rope import frozen_config
    from ..convert.options import PROGRAMS

    # It warns about rope_scaling entries that are only tried here.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    scaling = model.scaling
    scale = (scaling.reach or scaling.trained_length) / scaling.trained_length
    for program in PROGRAMS:
        try:
            frozen_config(config, scaling, scale, program)
            text = f"--freeze {scale:g} --for {program}"
        except InputError as error:
            text = f"not for {program}: {error}"
        except Exception as error:  # a boundary: model files raise anything on odd settings
            text = f"not for {program}: {one_line(error)}"
        yield "export", text


def _without_scaling(model: nn.Module, config: dict[str, Any]) -> Iterator[Row]:
    """Yield rows about a model without our scaling: what it is and what can be attached."""
    length = length_of(model, config)
    entry, own = config.get("rope_scaling"), own_entry(config)
    yield "trained length", f"{length} tokens" if length else "not in config.json"
    yield "scaling", f"{entry['type']}, mlx-lm's own" if entry else "none"
    if length:
        yield from _memory(model, length)
    try:
        sites = find_sites(model)
    except InputError as error:
        yield _PROBLEM, f"mlx_clex cannot attach a scaling: {error}"
        return
    yield from _ropes(model, sites)
    if own is not None:
        yield from _own_rope(config, str(own.get("type") or own.get("rope_type")))
    possible: list[str] = []
    for name in SCALINGS:
        try:
            attach(model, {"type": name}, trained_length=length or 2048)
            possible.append(name)
        except InputError as error:
            yield "not possible", f"{name}: {error}"
    note = "" if length else ", with --trained-length"
    yield "possible", f"mlx_clex.convert --scaling {'|'.join(possible)}{note}"


def _own_rope(config: dict[str, Any], kind: str) -> Iterator[Row]:
    before = original_length(config)
    drop = (
        f"--own-rope drop starts from a plain rope trained at {before} tokens"
        if before
        else "--own-rope drop is not possible without original_max_position_embeddings"
    )
    yield "own rope", f"{kind}; a scaling starts from it, {drop}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
