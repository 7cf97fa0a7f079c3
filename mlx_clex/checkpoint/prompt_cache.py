"""Save and load prompt caches together with a fingerprint of their model.

The file format is mlx-lm's with one more metadata entry. It has the fingerprint of model,
adapters and scaling, and the exact scales of the caches, which mlx-lm rounds to float32.

Not covered: computing the caches (`cache_prompt`), and batches.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, save_prompt_cache

from ..errors import InputError, RunError, reading
from ..model.plans import planned_caches, single_caches
from ..model.scaled_model import make_prompt_cache, scaled
from ..scaling.check import check_frequencies
from .files import expand, new_file
from .fingerprint import Fingerprint, difference
from .safetensors_file import read_tensors

_ENTRY = "mlx_clex"
_DIGITS = 9  # of a number in the name of an entry
_SPARE = 1000  # layers without an entry of their own
_SUFFIX = ".safetensors"  # the only suffix that mlx writes and reads


def file_for(name: str | Path) -> Path:
    """Return the path of a cache file, with the suffix that mlx adds.

    Raises:
        InputError: the parent folder does not exist, or the name is none of a file.
    """
    path = expand(name)
    if path.name in ("", "..") or str(name).endswith("/"):
        raise InputError(f"{str(name)!r} names no file: give one, such as book{_SUFFIX}.")
    if path.suffix != _SUFFIX:
        path = path.with_name(path.name + _SUFFIX)
    if not path.parent.is_dir():
        raise InputError(f"{name}: there is no folder {path.parent}. Create it first.")
    return path


def target_for(name: str | Path) -> Path:
    """Return the path of a cache file to write, so that a long reading is not for nothing.

    Raises:
        InputError: as `file_for`; the folder cannot be written, or the file is there and is no
            saved cache, such as the weights of a model.
    """
    file = file_for(name)
    try:
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): give another.") from error
    if file.exists():
        try:
            _, metadata = read_tensors(file)
        except (InputError, OSError):
            metadata = {}
        if not any(key.startswith("2.") for key in metadata):  # mlx-lm's list of classes
            raise InputError(f"{file} is there and is no saved cache: give another name.")
    return file


def save_cache(
    file: Path,
    caches: Sequence[Any],
    fingerprint: Fingerprint,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write caches to a file, atomically.

    Args:
        file: from `target_for`.
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
        InputError: no such file, no saved cache, a damaged one, or one that belongs to
            another model, adapter or scaling; the message says what differs.
    """
    file = _existing(name)
    with reading(f"{name} is no saved cache", always=True):
        _check_names([name for part in read_tensors(file) for name in part])
        caches, metadata = load_prompt_cache(str(file), return_metadata=True)
        metadata = dict(metadata or {})
        there = here
        if is_ours(metadata):
            entry = json.loads(metadata[_ENTRY])
            there = dict(entry["fingerprint"])
            for cache, scale in zip(planned_caches(caches), entry["scales"], strict=True):
                cache.scale = scale
    if what := difference(there, here):
        raise InputError(
            f"{name} cannot be used: {what}. Use the same model and options, or make it again."
        )
    scaling: Any = scaled(model).scaling
    kinds, wanted = _kinds(caches), _kinds(make_prompt_cache(model))
    if kinds != wanted:
        raise InputError(
            f"{name} has other caches than this model: {_counted(kinds)} in the file, "
            f"{_counted(wanted)} in the model. Make it again with this --model and --scale."
        )
    with reading(f"{name} is a damaged cache. Make it again"):
        if not _are_whole(caches, model):
            raise ValueError("its sizes or numbers are not those of this model")
        for scale in {cache.scale for cache in planned_caches(caches)} - {None}:
            check_frequencies(scaling, scale)
    return caches, metadata


def _check_names(names: Sequence[str]) -> None:
    """Refuse names from which mlx-lm would make lists of more entries than the file has."""
    for name in names:
        for part in name.split("."):
            if part.isdecimal() and (len(part) > _DIGITS or int(part) > _SPARE + len(names)):
                raise ValueError(f"it has the entry {name}, but only {len(names)} entries")


def metadata_of(name: str | Path) -> dict[str, str]:
    """Return the metadata of a cache file.

    Raises:
        InputError: the file is missing, or not a safetensors file.
    """
    file = _existing(name)
    with reading(f"{name} is no saved cache", always=True):
        _, metadata = read_tensors(file)
    # mlx-lm flattens the list [metadata, classes, scalars]; "0." marks the metadata.
    return {key[2:]: value for key, value in metadata.items() if key.startswith("0.")}


def _existing(name: str | Path) -> Path:
    # The name it was written under comes first: a text may have the name without the suffix.
    for file in (file_for(name), expand(name)):
        if file.is_file():
            return file
    raise InputError(f"There is no file {file_for(name)}.")


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Return whether mlx_clex wrote the file, with a fingerprint."""
    return _ENTRY in metadata


def quantised(caches: Sequence[Any]) -> Any:
    """Return the first quantised cache, which has the bits and the group size, or None."""
    return next((c for c in single_caches(caches) if isinstance(c, QuantizedKVCache)), None)


def length_of(caches: Sequence[Any]) -> int | None:
    """Return how many tokens the caches hold; None where no cache counts them."""
    lengths = [c.offset for c in single_caches(caches) if hasattr(c, "offset")]
    return max(lengths, default=None)


def _are_whole(caches: Sequence[Any], model: nn.Module) -> bool:
    """Whether the caches have the sizes that this model gives them, and finite numbers."""
    made = make_prompt_cache(model)
    model(mx.array([[0]]), cache=made)  # for the shapes alone: nothing is computed
    length = length_of(caches) or 0
    return all(
        _is_whole(cache, like, length)
        for cache, like in zip(single_caches(caches), single_caches(made), strict=True)
    )


def _is_whole(cache: Any, like: Any, length: int) -> bool:
    """Whether a cache of `length` tokens fits to one of the same model that holds one token."""
    if isinstance(cache, QuantizedKVCache):
        like = like.to_quantized(group_size=cache.group_size, bits=cache.bits)
    if not hasattr(like, "keys"):  # a state of fixed size (Mamba)
        return _fit(cache.state, like.state) or (length == 0 and cache.empty())
    counts = [cache.offset, getattr(cache, "_idx", 0), getattr(cache, "start_position", 0)]
    if not all(type(count) is int and 0 <= count <= cache.offset for count in counts):
        return False
    settings = ("keep", "max_size", "chunk_size")
    if any(getattr(cache, name, None) != getattr(like, name, None) for name in settings):
        return False
    if hasattr(cache, "expected_length") and not (
        type(cache.expected_length) is int
        and cache.expected_length >= 0
        and (cache.scale is None or 1 <= cache.scale < math.inf)
        and (cache.offset == 0 or (cache.scale is None) == (like.scale is None))
    ):
        return False
    if cache.offset != length * like.offset:  # a layer that shares keys has none of its own
        return False
    if cache.offset == 0:
        return cache.keys is None or _fit(cache.keys, like.keys, 0)
    held = min(cache.offset - counts[2], getattr(cache, "max_size", cache.offset))
    held = max(held, counts[1])
    return _fit(cache.keys, like.keys, held) and _fit(cache.values, like.values, held)


def _fit(there: Any, here: Any, length: int | None = None) -> bool:
    """Whether arrays have the shapes of others, and finite numbers.

    Args:
        there: nested arrays of a file.
        here: those of the model.
        length: the least size of axis 2, tokens; None: all axes are equal.
    """
    ours = dict(tree_flatten(here))
    theirs = dict(tree_flatten(there))
    if ours.keys() != theirs.keys():
        return False
    for name, like in ours.items():
        array = theirs[name]
        if not isinstance(array, mx.array) or not isinstance(like, mx.array):
            if array is not None or like is not None:
                return False
            continue
        shape, wanted = list(array.shape), list(like.shape)
        if length is not None and len(shape) == len(wanted):
            if shape.pop(2) < length:
                return False
            wanted.pop(2)
        floating = mx.issubdtype(like.dtype, mx.floating)
        same_kind = mx.issubdtype(array.dtype, mx.floating) == floating
        if shape != wanted or not same_kind or not mx.isfinite(array).all().item():
            return False
    return True


def _kinds(caches: Sequence[Any]) -> list[str]:
    return [type(cache).__name__.replace("Quantized", "") for cache in caches]


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"
