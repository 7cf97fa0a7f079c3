"""Load a model and its tokenizer from a folder or hub id.

Converted folders and other MLX folders load in place. Published checkpoints (CLEX and GeNE as
released, PyTorch shards, GGUF files) are first converted into a cache folder, once for each state
of the source.

Not covered: conversion itself (`mlx_clex.convert`).
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from . import bundled
from .checkpoint.adapters import add_adapters, other_base
from .checkpoint.digest import state_digest
from .checkpoint.files import expand
from .checkpoint.folder import (
    check_hub_id,
    files_of,
    needs_conversion,
    only_gguf,
    read_config,
)
from .checkpoint.lock import locked
from .checkpoint.tokenizer import open_tokenizer
from .checkpoint.unread import unread_settings
from .errors import InputError, reading, say
from .model.finite import check_finite
from .model.scaled_model import scaled
from .model.sharding import share_out, wait_for_all
from .model.stock import config_of
from .model_file import open_model
from .scaling import Scaling
from .scaling.check import check_frequencies

DEFAULT_CACHE = Path("~/.cache/mlx_clex")
# Part of the name of a cached conversion. Raise it when a conversion gives another result.
CONVERSION = 2


def load(
    path_or_hub_id: str | Path,
    scale: float | None = None,
    adapter_path: str | Path | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
    *,
    model_config: Mapping[str, Any] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    group: mx.distributed.Group | None = None,
    pipeline: bool = False,
    before_reading: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    Args:
        path_or_hub_id: a folder, a .gguf file, an id on the Hugging Face hub, or
            bundled:NAME for a model that comes with the package. A published checkpoint
            is converted first, into `<cache_dir>/<name>@<revision>`; the next load finds
            it there.
        scale: a fixed scale; None: the scale follows the length of the text.
        adapter_path: a folder of adapters to add to the model.
        trust_remote_code: let the tokenizer, or a `model_file` that is not from mlx_clex, run
            Python from the checkpoint.
        cache_dir: where conversions are kept; None takes `~/.cache/mlx_clex`.
        model_config: entries that replace those of config.json.
        tokenizer_config: more options for the tokenizer.
        group: processes that share the model; each reads its own part.
        pipeline: split the layers among the processes instead of the heads.
        before_reading: called with the whole model before its weights are read. An error that it
            raises ends the load.

    Returns:
        (model, tokenizer), as `mlx_lm.load` gives them.

    Raises:
        InputError: the checkpoint is missing, incomplete or damaged, asks for something
            unknown, or gives no finite numbers; the message says what.
    """
    if group is not None and group.size() == 1:
        group = None
    if group is not None and group.rank() > 0:
        # The first process converts; the others wait and use its result.
        wait_for_all(group)
    folder = resolve(path_or_hub_id, cache_dir=cache_dir)
    if group is not None and group.rank() == 0:
        wait_for_all(group)
    if adapter_path is not None and group is not None:
        raise InputError("Adapters cannot be shared among processes: fuse them first.")
    model, config = _load_model(
        folder,
        scale,
        adapter_path,
        model_config=model_config,
        trust_remote_code=trust_remote_code,
    )
    scaling = scaled(model).scaling
    if scale is not None and scaling is None:
        raise InputError(
            f"{path_or_hub_id} was not converted with mlx_clex, so --scale {scale:g} has no "
            "effect. Convert it with --scaling NAME first."
        )
    if folder.parent == bundled.FOLDER:
        # Stored in half precision to keep the package small; a CPU is faster in float32.
        model.set_dtype(mx.float32)
    _fit_to_cpu(model, path_or_hub_id)
    if before_reading is not None:
        before_reading(model)
    if group is not None:
        share_out(model, group, pipeline=pipeline)
    with reading(f"{folder} does not load"):
        # A lazy array would belong to the streams of this thread, and a server
        # generates in another one.
        mx.eval(model.parameters())
    if scaling is not None and (message := check_frequencies(scaling, scale)):
        warnings.warn(message, stacklevel=2)
    check_finite(model)
    tokenizer_options = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    tokenizer = open_tokenizer(folder, config, tokenizer_options)
    expect_long_texts(tokenizer)
    return model, tokenizer


def expect_long_texts(tokenizer: Any) -> None:
    """Silence transformers' warning of texts beyond the length in tokenizer_config.json."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    warned = getattr(inner, "deprecation_warnings", {})  # warnings it has already given
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True


def load_scaling(path_or_hub_id: str | Path, adapter_path: str | Path | None = None) -> Scaling:
    """Return the scaling of a model, without reading its other weights.

    Args:
        path_or_hub_id: as for `load`.
        adapter_path: a folder of adapters; their scaling is returned.

    Raises:
        InputError: as `load`, or the model has no mlx_clex scaling.
    """
    model, _ = _load_model(resolve(path_or_hub_id), None, adapter_path)
    scaling = scaled(model).scaling
    if scaling is None:
        raise InputError(
            f"{path_or_hub_id} was not converted with mlx_clex, so it has no scaling. Convert "
            "it with --scaling NAME first."
        )
    if message := check_frequencies(scaling, strict=True):
        warnings.warn(message, stacklevel=2)
    return scaling


def _load_model(
    folder: Path,
    scale: float | None,
    adapter_path: str | Path | None,
    *,
    model_config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model and its config; weights are read when they are first needed."""
    with reading(f"{folder} does not load"):
        model, config = open_model(
            folder,
            scale=scale,
            model_config=model_config,
            trust_remote_code=trust_remote_code,
        )
    for note in unread_settings(config_of(model), model):
        say(note)
    if adapter_path is not None:
        add_adapters(model, adapter_path, scale)
        if message := other_base(folder, adapter_path):
            say(message)
    return model, config


def resolve(path_or_hub_id: str | Path, *, cache_dir: str | Path | None = None) -> Path:
    """Return the folder that mlx-lm can read; download or convert it if needed.

    Raises:
        InputError: there is no such folder or hub id, or it has no usable weights.
    """
    if str(path_or_hub_id).startswith(bundled.PREFIX):
        return bundled.folder(str(path_or_hub_id).removeprefix(bundled.PREFIX))
    path = expand(path_or_hub_id)
    cache = expand(cache_dir or DEFAULT_CACHE)
    if path.suffix == ".gguf" and path.is_file():
        return _converted(str(path), cache / f"{path.stem}@{state_digest([path])}-{CONVERSION}")
    if path.is_dir() and str(path_or_hub_id):
        files = files_of(path)
        names = [file.name for file in files]
        if not (only_gguf(names) or needs_conversion(names, read_config(path), path)):
            return path
        name = f"{path.resolve().name}@{state_digest(files)}-{CONVERSION}"
        return _converted(str(path), cache / name)
    return _from_hub(check_hub_id(path_or_hub_id), cache)


def _from_hub(hub_id: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    from .convert.read.hub import config_folder, guarded, look_up

    listing = look_up(hub_id)
    target = cache / f"{hub_id.replace('/', '--')}@{listing.commit[:12]}-{CONVERSION}"
    if target.is_dir():
        return target

    def snapshot() -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=DEFAULT_ALLOW_PATTERNS))

    names = list(listing.sizes)
    if not (
        only_gguf(names)
        or needs_conversion(names, read_config(config_folder(hub_id, listing)), hub_id)
    ):
        return listing.folder or guarded(hub_id, None, snapshot)
    suffixes = (".safetensors", ".bin", ".gguf")
    weights = (size for name, size in listing.sizes.items() if name.endswith(suffixes))
    say(f"{hub_id} is a published checkpoint ({sum(weights) / 1e9:.1f} GB of weights).")
    return _converted(hub_id, target)


def _converted(source: str, target: Path) -> Path:
    """Return the conversion of `source`; make it if it is not there."""
    if target.is_dir():
        return target
    from .convert import convert

    with locked(target):
        if not target.is_dir():  # another process may have made it
            say(f"Converting {source} into {target}, once.")
            convert(source, target)
    return target


def _fit_to_cpu(model: nn.Module, name: str | Path) -> None:
    """On a CPU, warn of slow types and cast experts to float32, the only type MLX takes."""
    if mx.default_device() != mx.cpu:
        return
    modules = model.modules()
    types = {module.weight.dtype for module in modules if type(module) is nn.Linear}
    if types & {mx.bfloat16, mx.float16}:
        say(
            f"{name} is in half precision, in which a CPU is up to 30 times slower than in "
            "float32. Convert it with --dtype float32."
        )
    for module in modules:
        if type(module) is SwitchLinear and module.weight.dtype != mx.float32:
            module.weight = module.weight.astype(mx.float32)
