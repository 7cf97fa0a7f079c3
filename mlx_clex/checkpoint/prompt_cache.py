"""Save and load prompt caches together with a fingerprint of their model.

The file format is mlx-lm's with one more metadata entry. It has the fingerprint of model,
adapters and scaling, and the exact scales of the caches, which mlx-lm rounds to float32.

Not covered: computing the caches (`cache_prompt`), and batches.
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

# Exceptions that mlx and mlx-lm raise for a file that is not a prompt cache.
_BROKEN = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError)
_ENTRY = "mlx_clex"
_SUFFIX = ".safetensors"  # the only suffix that mlx writes and reads


def file_for(name: str | Path) -> Path:
    """Return the path of a cache file, with the suffix that mlx adds.

    Raises:
        InputError: the parent folder does not exist.
    """
    path = Path(name).expanduser()
    if path.suffix != _SUFFIX:
        path = path.with_name(path.name + _SUFFIX)
    if not path.parent.is_dir():
        raise InputError(f"{name}: there is no folder {path.parent}. Create it first.")
    return path


def save_cache(
    file: Path,
    caches: Sequence[Any],
    fingerprint: Fingerprint,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write caches to a file, atomically.

    Args:
        file: from `file_for`.
        caches: the caches of one sequence.
        fingerprint: the fingerprint of the model that computed them.
        metadata: more texts to store.

    Raises:
        RunError: the file cannot be written.
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
    """Return (caches, metadata) of a file that belongs to this model.

    A file that mlx-lm wrote has no fingerprint (see `is_ours`). For such a file only the kinds
    of the caches are checked.

    Args:
        name: path of the file, as the user gave it.
        model: the model that will continue the caches.
        here: the fingerprint of this model.

    Raises:
        InputError: the file is missing, not a prompt cache, or belongs to another model,
            other adapters or another scaling.
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
        raise InputError(f"{name} is not a prompt cache: {one_line(error)}") from error
    if entry is not None and (what := difference(there, here)):
        raise InputError(
            f"{name} cannot be used: {what}. Use the same model and options, or make it again."
        )
    kinds, wanted = _kinds(caches), _kinds(make_prompt_cache(model))
    if kinds != wanted:
        raise InputError(
            f"{name} has other caches than this model: {_counted(kinds)} in the file, "
            f"{_counted(wanted)} in the model. Make it again with this --model and --scale."
        )
    return caches, metadata


def metadata_of(name: str | Path) -> dict[str, str]:
    """Return the metadata of a cache file.

    Raises:
        InputError: the file is missing, or not a safetensors file.
    """
    try:
        loaded: Any = mx.load(str(_existing(name)), return_metadata=True)
    except _BROKEN as error:
        raise InputError(f"{name} is not a prompt cache: {one_line(error)}") from error
    # mlx-lm flattens the list [metadata, classes, scalars]; "0." marks the metadata.
    return {key[2:]: value for key, value in loaded[1].items() if key.startswith("0.")}


def _existing(name: str | Path) -> Path:
    path = Path(name).expanduser()
    file = path if path.is_file() else file_for(name)
    if not file.is_file():
        raise InputError(f"There is no file {file}.")
    return file


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Return whether mlx_clex wrote the file, with a fingerprint."""
    return _ENTRY in metadata


def quantised(caches: Sequence[Any]) -> Any:
    """Return the first quantised cache, which has the bits and the group size, or None."""
    return next((c for c in single_caches(caches) if isinstance(c, QuantizedKVCache)), None)


def _kinds(caches: Sequence[Any]) -> list[str]:
    return [type(cache).__name__.replace("Quantized", "") for cache in caches]


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"
