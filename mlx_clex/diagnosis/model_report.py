"""Describe a model for `doctor`: rope, scaling, reach, memory, exports and problems.

Everything comes out of config.json, the headers and sizes of the files and the scaling's tensors.
The model is built, but MLX is lazy: its weights are neither read nor made up, so a model of any
size takes seconds.

Not covered: the numbers in the weights, which loading checks.
"""

import logging
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import base_config, normalise_config
from ..checkpoint.files import read_json
from ..checkpoint.folder import SHIM, files_of, needs_conversion
from ..checkpoint.tokenizer import open_tokenizer
from ..checkpoint.unread import unread_settings
from ..errors import InputError, one_line, reading
from ..model.find_ropes import Site, find_sites
from ..model.own_rope import dropped_rope, length_of, own_entry
from ..model.scaled_model import ScaledModel, attach
from ..model.stock import model_name
from ..model_file import open_model
from ..scaling import SCALINGS, Scaling
from ..scaling.check import check_frequencies
from .machine import size_text, this_machine
from .plan import memory_rows
from .sizes import caches_of, sizes_of
from .source import Source, build, find_source

Row = tuple[str, str]

_KV_BITS = (8, 4)
PROBLEM = "problem"


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
    source = find_source(path_or_hub_id)
    rows = [("model", source.name), *_files(source)]
    try:
        model = build(source)
        config = normalise_config(source.config)
    except InputError as error:
        return [*rows, (PROBLEM, str(error))]
    if not any(name == PROBLEM for name, _ in rows):
        rows += _loading(source)
    rows += [(PROBLEM, note) for note in unread_settings(base_config(config), model)]
    rows.append(("family", f"{config.get('model_type')} ({model_name(model)})"))
    if isinstance(model, ScaledModel):
        rows += _curve(source.path, model.scaling)
        _stand_in(model)
        return [
            *rows,
            *_ropes(model, find_sites(model)),
            *_scaling(model, source),
            *_exports(model, config),
        ]
    return [*rows, *_without_scaling(model, source, config)]


def _files(source: Source) -> Iterator[Row]:
    folder, config = source.path, source.config
    if folder is None:
        yield "download", size_text(source.download)
        return
    if not folder.is_dir():
        yield "weights", f"{size_text(folder.stat().st_size)}, .gguf: load converts it once"
        return
    names = [file.name for file in files_of(folder)]
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    try:
        published = needs_conversion(names, config, folder)
    except InputError as error:
        yield PROBLEM, str(error)
        return
    kind = "mlx-lm reads them as they are"
    if config.get("model_file") == SHIM:
        kind = "converted by mlx_clex"
    elif published:
        kind = "a published checkpoint: load converts it once"
    size = sum((folder / name).stat().st_size for name in weights)
    yield "weights", f"{size_text(size)} in {len(weights)} files, {kind}"
    from ..convert.read.source import choose_weights

    try:
        choose_weights(names, lambda name: read_json(folder / name), str(folder))
    except InputError as error:
        yield PROBLEM, str(error)
    if not any(name.startswith(("tokenizer.", "vocab.")) for name in names):
        yield PROBLEM, "No tokenizer. Copy the tokenizer files of the base model here."


def _loading(source: Source) -> Iterator[Row]:
    """Yield what loading would refuse; the weights are mapped and not read."""
    folder = source.path
    if folder is None or not folder.is_dir():
        return
    if needs_conversion([file.name for file in files_of(folder)], source.config, folder):
        return
    try:
        with reading(f"{folder} does not load"):
            _, config = open_model(folder)
        open_tokenizer(folder, config)
    except InputError as error:
        yield PROBLEM, str(error)


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


def _curve(folder: Path | None, scaling: Scaling) -> Iterator[Row]:
    """What is wrong with the learned frequencies of a published or converted folder."""
    if folder is None or not scaling.learned:
        return
    from ..convert.pipeline import learned_tensors

    try:
        with reading("The learned frequencies are not known"):
            scaling.take_weights(learned_tensors(folder))
            message = check_frequencies(scaling, strict=True)
    except InputError as error:
        message = str(error)
    if message is not None:
        yield PROBLEM, message


def _stand_in(model: Any) -> None:
    """Fill the learned tensors with random numbers.

    A fresh scaling is a special case that more programs can express than a trained one.
    """
    for index, name in enumerate(model.scaling.learned):
        shape = model.scaling[name].shape
        model.scaling[name] = mx.random.normal(shape, key=mx.random.key(index)) / model.scaling.dims


def _scaling(model: Any, source: Source) -> Iterator[Row]:
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
    yield from _memory(model, source, scaling.reach or scaling.trained_length)


def _memory(model: nn.Module, source: Source, length: int) -> Iterator[Row]:
    """Yield rows about the caches and the peak at a length, on this machine."""
    caches, _ = caches_of(model)
    texts = [f"{size_text(caches.nbytes(length, 2))} in 16 bits"]
    for bits in _KV_BITS if caches.quantisable else ():
        texts.append(f"{size_text(caches.nbytes(length, 2, bits))} with --kv-bits {bits}")
    texts.append(f"{size_text(caches.nbytes(length, 4))} in float32")
    yield "KV cache", f"at {length} tokens: {', '.join(texts)}"
    try:
        yield from memory_rows(sizes_of(source, model=model), this_machine(), length)
    except InputError as error:
        yield PROBLEM, f"Its memory is not known: {error}"


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


def _without_scaling(model: nn.Module, source: Source, config: dict[str, Any]) -> Iterator[Row]:
    """Yield rows about a model without our scaling: what it is and what can be attached."""
    length = length_of(model, config)
    entry, own = config.get("rope_scaling"), own_entry(config)
    yield "trained length", f"{length} tokens" if length else "not in config.json"
    yield "scaling", f"{entry['type']}, mlx-lm's own" if entry else "none"
    if length:
        yield from _memory(model, source, length)
    try:
        sites = find_sites(model)
    except InputError as error:
        yield PROBLEM, f"mlx_clex cannot attach a scaling: {error}"
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
    yield "possible", f"mlx_clex convert --scaling {'|'.join(possible)}{note}"


def _own_rope(config: dict[str, Any], kind: str) -> Iterator[Row]:
    drop = dropped_rope(config) or (
        "--own-rope drop is not possible without original_max_position_embeddings"
    )
    yield "own rope", f"{kind}; a scaling starts from it; {drop}"
