"""From what the user named to a checkpoint on this machine.

Not covered: which files of a folder are read (`read/source.py`).
"""

from pathlib import Path

from mlx_clex.checkpoint.folder import check_hub_id
from mlx_clex.errors import InputError

from .read.hub import download
from .read.source import Checkpoint, read_folder


def find(hf_path: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint, downloading what is needed of one on the hub.

    Args:
        hf_path: a folder, a .gguf file, or a hub id such as "owner/name".
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: there is no such folder or id, it has no weights or no config.json,
            or a shard that its index names is missing.
    """
    path = Path(hf_path).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"{path} is a file. Give the folder it lies in, a .gguf file, or a hub id."
            )
        return Checkpoint(path.parent, "gguf", [path])
    if is_local(hf_path):
        if revision is not None:
            raise InputError(f"--revision {revision} is for hub ids; {path} is a folder.")
        return read_folder(path)
    repo = check_hub_id(hf_path)
    return read_folder(download(repo, revision), repo)


def is_local(hf_path: str | Path) -> bool:
    """Whether a file or folder of this name is here, which comes before a hub id."""
    # An empty name would be the folder one stands in.
    return str(hf_path) != "" and Path(hf_path).expanduser().exists()
