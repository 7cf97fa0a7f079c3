"""A checkpoint folder: its config.json, and whether mlx-lm can read it.

Not covered: what the settings in config.json mean (`config.py`).
"""

import difflib
import re
from pathlib import Path
from typing import Any

from ..bundled import MODELS
from ..errors import InputError
from ..scaling import SCALINGS
from .config import SHIM, normalise_config, set_tied
from .digest import samples_by_name
from .files import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_hub_id(name: str | Path) -> str:
    """Return the name of a model that is not on this machine, if it can be a hub id.

    Args:
        name: what the user gave, where no file or folder of that name is.

    Raises:
        InputError: it has not the form OWNER/NAME; the message has the nearest folder.
    """
    text = str(name)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return text
    near = _nearest(text)
    raise InputError(
        f"There is no folder or file {text!r}{f'; did you mean {near}?' if near else '.'} A model "
        "is a folder, a .gguf file, OWNER/NAME on the Hugging Face hub, or one of "
        f"{', '.join(MODELS.values())}."
    )


def _nearest(name: str) -> str | None:
    """The most similar name of a folder, .gguf file or bundled model, or None."""
    path = Path(name).expanduser()
    known = dict.fromkeys(MODELS.values())
    if path.name and path.parent.is_dir():
        inside = (e for e in path.parent.iterdir() if e.is_dir() or e.suffix == ".gguf")
        known |= dict.fromkeys(str(path.with_name(entry.name)) for entry in inside)
    return next(iter(difflib.get_close_matches(str(path), known, n=1)), None)


def files_of(folder: Path) -> list[Path]:
    """List the regular files of a checkpoint folder, without hidden ones, by name.

    Raises:
        InputError: one is a link to a file outside the folder, which is not followed.
    """
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    inside = folder.resolve()
    # In the hub's cache the files of a snapshot are links to blobs two folders up.
    allowed = (inside, inside.parent.parent / "blobs")
    for file in files:
        if file.is_symlink() and not any(file.resolve().is_relative_to(top) for top in allowed):
            raise InputError(
                f"{file} is a link to a file outside its folder, which is not followed. Copy the "
                "file there."
            )
    return files


def read_config(folder: Path) -> dict[str, Any]:
    """Parse config.json of a folder.

    Raises:
        InputError: it is missing or no JSON object.
    """
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json. Give the folder of a model, or a hub id.")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} is no JSON object.")
    return config


def tied_override(folder: Path) -> dict[str, bool]:
    """Return tie_word_embeddings where the weights of a folder decide it, else nothing."""
    samples = samples_by_name([f for f in files_of(folder) if f.suffix == ".safetensors"])
    head = samples.get("lm_head.weight")
    if head is None or "lm_head.scales" in samples:
        return {}
    embeddings = [text for name, text in samples.items() if name.endswith("embed_tokens.weight")]
    config = read_config(folder)
    set_tied(config, has_head=True, same=head in embeddings)
    return {"tie_word_embeddings": config["tie_word_embeddings"]}


def needs_conversion(names: list[str], config: dict[str, Any], where: Any) -> bool:
    """Tell whether mlx-lm cannot read a checkpoint as it is.

    Args:
        names: of its files.
        config: its config.json as parsed.
        where: what to call it in an error.

    Raises:
        InputError: it has no weights.
    """
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith(".bin") for name in names):
            return True
        raise InputError(
            f"{where} has no weights: no .safetensors and no .bin file. Was its download complete?"
        )
    if config.get("model_file") == SHIM:
        return False
    method = (normalise_config(config).get("rope_scaling") or {}).get("type")
    return method in SCALINGS and SCALINGS[method].published
