"""Prompt caches on disk, with what they belong to inside.

The files are those of mlx-lm, one entry of metadata more: the fingerprint of model, adapter
and scaling, and the scales of the caches as exact numbers, which mlx-lm rounds to float32.

Not covered: making the caches (`cache_prompt`), and batches.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, save_prompt_cache

from ..errors import InputError, RunError
from ..model.plans import planned_caches, single_caches
from ..model.scaled_model import make_prompt_cache
from .fingerprint import Fingerprint, difference

_ENTRY = "mlx_clex"
_SUFFIX = ".safetensors"  # mlx writes and reads no other


def file_for(name: str | Path) -> Path:
    """The file that a --prompt-cache-file names; mlx adds the suffix where it is missing.

    Raises:
        InputError: there is no folder to write it into.
    """
    path = Path(name).expanduser()
    if path.suffix != _SUFFIX:
        path = path.with_name(path.name + _SUFFIX)
    if not path.parent.is_dir():
        raise InputError(f"--prompt-cache-file {name}: there is no folder {path.parent}.")
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
    unfinished = file.with_name(f".{file.stem}.{os.getpid()}{_SUFFIX}")
    try:
        save_prompt_cache(str(unfinished), list(caches), {**(metadata or {}), _ENTRY: entry})
        unfinished.replace(file)
    except (RuntimeError, OSError) as error:
        raise RunError(f"{file} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


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
    file = Path(name).expanduser() if Path(name).expanduser().is_file() else file_for(name)
    if not file.is_file():
        raise InputError(f"--prompt-cache-file {name} is no file.")
    try:
        caches, metadata = load_prompt_cache(str(file), return_metadata=True)
        metadata = dict(metadata or {})
        entry = json.loads(metadata[_ENTRY]) if is_ours(metadata) else None
        if entry is not None:
            there = dict(entry["fingerprint"])
            for cache, scale in zip(planned_caches(caches), entry["scales"], strict=True):
                cache.scale = scale
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"--prompt-cache-file {name} is no saved cache: {error}") from error
    if entry is not None and (what := difference(there, here)):
        raise InputError(
            f"--prompt-cache-file {name} was made with another model, adapter or scaling ({what}). "
            "Make it again with mlx_clex.cache_prompt."
        )
    kinds, wanted = _kinds(caches), _kinds(make_prompt_cache(model))
    if kinds != wanted:
        raise InputError(
            f"--prompt-cache-file {name} holds other caches than this model uses: "
            f"{_summary(kinds)} there, {_summary(wanted)} here. Make it again with "
            "mlx_clex.cache_prompt, with the --model and --scale it is for."
        )
    return caches, metadata


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether the file says which model it belongs to."""
    return _ENTRY in metadata


def quantised(caches: Sequence[Any]) -> Any:
    """The first quantised cache, which knows its bits and group size, or None."""
    return next((c for c in single_caches(caches) if isinstance(c, QuantizedKVCache)), None)


def _kinds(caches: Sequence[Any]) -> list[str]:
    return [type(cache).__name__.replace("Quantized", "") for cache in caches]


def _summary(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"
