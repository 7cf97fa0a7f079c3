"""Prompt caches on disk, with what they belong to inside.

The files are those of mlx-lm, one entry of metadata more: the fingerprint of model, adapter
and scaling, and the scales of the caches as exact numbers, which mlx-lm rounds to float32.

Not covered: making the caches (`cache_prompt`), and batches.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, save_prompt_cache

from ..errors import InputError, RunError, one_line
from ..model.plans import planned_caches, single_caches
from ..model.scaled_model import make_prompt_cache
from .files import new_file
from .fingerprint import Fingerprint, difference

# What libraries raise on a file that is broken, or something else.
_BROKEN = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError)
_ENTRY = "mlx_clex"
_SUFFIX = ".safetensors"  # mlx writes and reads no other


def file_for(name: str | Path) -> Path:
    """Return the file that a name stands for; mlx adds the suffix where it is missing.

    Raises:
        InputError: there is no folder to write it into.
    """
    path = Path(name).expanduser()
    if path.suffix != _SUFFIX:
        path = path.with_name(path.name + _SUFFIX)
    if not path.parent.is_dir():
        raise InputError(f"{name}: there is no folder {path.parent}.")
    return path


def save_cache(
    file: Path,
    caches: Sequence[Any],
    fingerprint: Fingerprint,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write caches, whole or not at all.

    Args:
        file: from `file_for`.
        caches: of one sequence.
        fingerprint: of the model that made them.
        metadata: more texts to keep with them.

    Raises:
        RunError: they cannot be written.
    """
    scales = [cache.scale for cache in planned_caches(caches)]
    entry = json.dumps({"fingerprint": fingerprint, "scales": scales})
    try:
        with new_file(file) as unfinished:
            save_prompt_cache(str(unfinished), list(caches), {**(metadata or {}), _ENTRY: entry})
    except (RuntimeError, OSError) as error:
        raise RunError(f"{file} cannot be written: {error}") from error


def load_cache(
    name: str | Path, model: nn.Module, here: Fingerprint
) -> tuple[list[Any], dict[str, str]]:
    """Read caches and their metadata, if they are this model's.

    Args:
        name: as the user gave it.
        model: that is to continue them.
        here: its fingerprint.

    Returns:
        (caches, metadata). Without a fingerprint in the file, which is then mlx-lm's own,
        only the kinds of caches are compared: see `is_ours`.

    Raises:
        InputError: no such file, no saved cache, or one that belongs to another model,
            adapter or scaling; the message says what differs.
    """
    file = _existing(name)
    try:
        caches, metadata = load_prompt_cache(str(file), return_metadata=True)
        metadata = dict(metadata or {})
        entry = json.loads(metadata[_ENTRY]) if is_ours(metadata) else None
        if entry is not None:
            there = dict(entry["fingerprint"])
            for cache, scale in zip(planned_caches(caches), entry["scales"], strict=True):
                cache.scale = scale
    except _BROKEN as error:
        raise InputError(f"{name} is no saved cache: {one_line(error)}") from error
    if entry is not None and (what := difference(there, here)):
        raise InputError(
            f"{name} cannot be used: {what}. Give what it was made with, or make it again."
        )
    kinds, wanted = _kinds(caches), _kinds(make_prompt_cache(model))
    if kinds != wanted:
        raise InputError(
            f"{name} holds other caches than this model uses: {_counted(kinds)} there, "
            f"{_counted(wanted)} here. Make it again with the --model and --scale it is for."
        )
    return caches, metadata


def metadata_of(name: str | Path) -> dict[str, str]:
    """Read the metadata of a cache file alone.

    Raises:
        InputError: no such file, or no safetensors file.
    """
    try:
        loaded: Any = mx.load(str(_existing(name)), return_metadata=True)
    except _BROKEN as error:
        raise InputError(f"{name} is no saved cache: {one_line(error)}") from error
    # mlx-lm flattens [metadata, classes, scalars].
    return {key[2:]: value for key, value in loaded[1].items() if key.startswith("0.")}


def _existing(name: str | Path) -> Path:
    path = Path(name).expanduser()
    file = path if path.is_file() else file_for(name)
    if not file.is_file():
        raise InputError(f"There is no file {file}.")
    return file


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether the file says which model it belongs to."""
    return _ENTRY in metadata


def quantised(caches: Sequence[Any]) -> Any:
    """The first quantised cache, which knows its bits and group size, or None."""
    return next((c for c in single_caches(caches) if isinstance(c, QuantizedKVCache)), None)


def _kinds(caches: Sequence[Any]) -> list[str]:
    return [type(cache).__name__.replace("Quantized", "") for cache in caches]


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"
