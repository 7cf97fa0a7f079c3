"""Find the config of a model and build the model without its weights.

MLX is lazy: the weights are neither read nor made up, so a model of any size takes seconds.

Not covered: what is said about the model (`model_report.py`), and its memory (`memory.py`).
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from .. import bundled
from ..checkpoint.files import expand, read_json
from ..checkpoint.folder import (
    check_hub_id,
    files_of,
    headers_of,
    held_by,
    only_gguf,
    read_config,
)
from ..checkpoint.sizes import Held
from ..errors import InputError, one_line
from ..model_file import Model, ModelArgs

_LARGEST = 1 << 42  # bytes
_MISSING = re.compile(r"missing \d+ required positional arguments?: (.*)")


class Source(NamedTuple):
    """Where a model is."""

    name: str
    config: dict[str, Any]
    path: Path | None  # its folder or .gguf file; None: on the hub
    held: Held | None = None  # what its files can hold; None: see `held_by_files`
    download: int = 0  # bytes of its files on the hub


def find_source(path_or_hub_id: str | Path) -> Source:
    """Find a model; only config.json is downloaded.

    Args:
        path_or_hub_id: a folder, a .gguf file, a Hugging Face id, or bundled:NAME.

    Raises:
        InputError: the model is not found, or has no readable config.json.
    """
    if str(path_or_hub_id).startswith(bundled.PREFIX):
        path_or_hub_id = bundled.folder(str(path_or_hub_id).removeprefix(bundled.PREFIX))
    path = expand(path_or_hub_id)
    if path.suffix == ".gguf" and path.is_file():
        from ..convert.read.gguf_file import config_of, header, read

        gguf = read(path)
        return Source(str(path), config_of(gguf), path, Held.of(header(gguf).values()))
    if path.is_dir():
        names = [file.name for file in files_of(path)]
        if not only_gguf(names):
            return Source(str(path), read_config(path), path)
        from ..convert.read.source import choose_weights

        _, (gguf_name,) = choose_weights(names, read_json, str(path))
        return find_source(path / gguf_name)
    hub_id = check_hub_id(str(path_or_hub_id))
    from ..convert.read.hub import config_folder, look_up

    listing = look_up(hub_id)
    if only_gguf(listing.sizes):
        if listing.folder:
            return find_source(listing.folder)
        raise InputError(
            f"The config of {hub_id} is inside its .gguf file. Download that (hf download "
            f"{hub_id}) and give the path that this prints."
        )
    folder = config_folder(hub_id, listing)
    size = sum(listing.sizes.values())
    return Source(hub_id, read_config(folder), None, Held.in_bytes(size), size)


def held_by_files(folder: Path) -> Held:
    """Return what the weight files of a folder can hold; without any, what a large model has.

    Raises:
        InputError: a file is broken.
    """
    from ..convert.read.torch_pickle import read_tensors

    files = files_of(folder)
    bins = [file for file in files if file.suffix == ".bin"]
    if not bins and not any(file.suffix == ".safetensors" for file in files):
        return Held.in_bytes(_LARGEST)
    if bins and not any(file.suffix == ".safetensors" for file in files):
        return Held.of(tensor.info for file in bins for tensor in read_tensors(file).values())
    return held_by(headers_of(folder), read_config(folder))


def build(source: Source) -> nn.Module:
    """Return the model of a config, with random weights that are never computed.

    Raises:
        InputError: the config does not make a model, or asks for more than the model's files can
            hold; the message names what it lacks.
    """
    held = source.held
    if held is None and source.path is not None:
        held = held_by_files(source.path)
    try:
        return Model(ModelArgs.from_dict(source.config), held=held)
    except InputError:
        raise
    except Exception as error:  # model files raise anything on settings they do not take
        if missing := _MISSING.search(str(error)):
            raise lacks(missing[1].replace("'", "")) from error
        raise InputError(f"config.json does not make a model: {one_line(error)}") from error


def lacks(what: str) -> InputError:
    """Return the error for a config without the entries it needs."""
    return InputError(f"config.json lacks {what}. Copy the model's own config.json.")
