"""Find the checkpoint that the user names, on this machine or on the hub.

Not covered: which files of a folder are read (`read/source.py`).
"""

from pathlib import Path

from mlx_clex.checkpoint.files import expand
from mlx_clex.checkpoint.folder import check_hub_id
from mlx_clex.errors import InputError

from .read.hub import download
from .read.source import Checkpoint, read_folder


def find(hf_path: str | Path, revision: str | None = None) -> Checkpoint:
    """Return a checkpoint; download the needed files of a hub id.

    Args:
        hf_path: a folder, a .gguf file, or a hub id such as "owner/name".
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: there is no such folder or id, it has no weights or no config.json,
            or a shard that its index names is missing.
    """
    path = expand(hf_path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path} is a file. Give its folder, a .gguf file, or a hub id.")
        return Checkpoint(path.parent, "gguf", [path])
    if is_local(hf_path):
        if revision is not None:
            raise InputError(f"--revision {revision} is for hub ids; {path} is a folder.")
        return read_folder(path)
    repo = check_hub_id(hf_path)
    return read_folder(download(repo, revision), repo)


def is_local(hf_path: str | Path) -> bool:
    """Return whether a local file or folder has this name; it is preferred to a hub id."""
    # Path("") is the current folder.
    return str(hf_path) != "" and expand(hf_path).exists()
