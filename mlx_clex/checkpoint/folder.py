"""Read a checkpoint folder's config.json and tell whether mlx-lm can load the folder.

Not covered: the meaning of the settings in config.json (`config.py`).
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..bundled import MODELS
from ..errors import InputError
from ..scaling import SCALINGS
from .config import SHIM, normalise_config
from .files import check_link, expand, largest_size, read_json
from .safetensors_file import TensorInfo, read_header
from .sizes import Held

# Suffixes of files that mlx-lm, transformers or mlx_clex open, and of those that are parsed whole.
_PARSED = (".json", ".jinja", ".model", ".tiktoken")
_OPENED = (*_PARSED, ".txt", ".safetensors", ".bin", ".gguf", ".py")
TEMPLATES = "additional_chat_templates"  # a folder that transformers reads
_PACKED = ("awq", "gptq")  # whose weights are called qweight
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_hub_id(name: str | Path) -> str:
    """Return the name of a model that is not on this machine if it can be a hub id.

    Args:
        name: what the user gave; no file or folder has this name.

    Raises:
        InputError: the name does not have the form OWNER/NAME. The message suggests the most
            similar folder.
    """
    text = str(name)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return text
    near = _nearest(text)
    raise InputError(
        f"There is no folder or file {text!r}{f'; did you mean {near}?' if near else '.'} A model "
        "is a folder, a .gguf file, a Hugging Face id OWNER/NAME, or one of "
        f"{', '.join(MODELS.values())}."
    )


def _nearest(name: str) -> str | None:
    """Return the most similar name of a folder, .gguf file or bundled model, or None."""
    path = expand(name)
    known = dict.fromkeys(MODELS.values())
    if path.name and path.parent.is_dir():
        inside = (e for e in path.parent.iterdir() if e.is_dir() or e.suffix == ".gguf")
        known |= dict.fromkeys(str(path.with_name(entry.name)) for entry in inside)
    return next(iter(difflib.get_close_matches(str(path), known, n=1)), None)


def files_of(folder: Path) -> list[Path]:
    """Return the visible regular files of a checkpoint folder, sorted by name.

    mlx-lm and transformers open files by their names, whatever these are. So every file that
    they may open is checked here, before they do.

    Raises:
        InputError: a file is a link that leads out of the folder, a pipe, a device or a folder,
            or a text of a size that no model has.
    """
    files = []
    if not folder.is_dir():
        raise InputError(f"{folder} is neither a folder nor a regular file. Copy it again.")
    entries = [*folder.iterdir(), *(folder / TEMPLATES).glob("*")]
    for file in sorted(entry for entry in entries if not entry.name.startswith(".")):
        check_link(file, folder)
        regular = file.is_file()
        if not regular and file.suffix in _OPENED:
            raise InputError(f"{file} is not a regular file. Copy the checkpoint again.")
        if regular and file.suffix in _PARSED and file.stat().st_size > largest_size(file.name):
            raise InputError(
                f"{file} is larger than {largest_size(file.name)} bytes. Copy the checkpoint again."
            )
        if regular and file.parent == folder:
            files.append(file)
    return files


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json.

    Raises:
        InputError: the file is missing, or it or generation_config.json is not a JSON object.
    """
    if not os.path.lexists(folder / "config.json"):
        raise InputError(
            f"{folder} has no config.json. Give the folder of a model, or a Hugging Face id."
        )
    # mlx-lm reads generation_config.json too.
    for name in ("generation_config.json", "config.json"):
        check_link(folder / name, folder)
        config = read_json(folder / name) if os.path.lexists(folder / name) else {}
        if not isinstance(config, dict):
            raise InputError(f"{folder / name} is not a JSON object. Copy it again.")
    return config


Headers = Mapping[Path, Mapping[str, TensorInfo]]


def headers_of(folder: Path) -> Headers:
    """Return the checked headers of the .safetensors files of a folder.

    Raises:
        InputError: a file is broken, or as `files_of`.
    """
    return {f: read_header(f) for f in files_of(folder) if f.suffix == ".safetensors"}


def held_by(headers: Headers, config: Mapping[str, Any]) -> Held:
    """Return what the .safetensors files of a folder hold, as their headers say.

    Raises:
        InputError: the config names a quantisation that no tensor has.
    """
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if method in _PACKED and not any(name.endswith(".qweight") for name in tensors):
        raise InputError(
            f"config.json says that the weights are quantised with {method}, but no tensor is "
            "(none is called qweight). Remove quantization_config, or download the weights again."
        )
    return Held.of(tensors.values())


def only_gguf(names: Iterable[str]) -> bool:
    """Return whether the weights of a checkpoint are .gguf files, which have a config of their own.

    Args:
        names: names of its files.
    """
    suffixes = {Path(name).suffix for name in names}
    return ".gguf" in suffixes and not suffixes & {".safetensors", ".bin"}


def needs_conversion(names: list[str], config: dict[str, Any], where: Any) -> bool:
    """Return whether a checkpoint must be converted before mlx-lm can load it.

    Args:
        names: names of its files.
        config: the content of its config.json.
        where: its name in an error.

    Raises:
        InputError: the checkpoint has no weights.
    """
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith(".bin") for name in names):
            return True
        raise InputError(
            f"{where} has no weights: no .safetensors or .bin file. Download it again."
        )
    if config.get("model_file") == SHIM:
        return False
    method = (normalise_config(config).get("rope_scaling") or {}).get("type")
    return method in SCALINGS and SCALINGS[method].published
