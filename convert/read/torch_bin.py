"""Rewrite pytorch_model.bin shards as safetensors.

A .bin file is a pickle, which `torch_pickle.py` checks first. torch reads it with
`weights_only=True`, which runs no code, and maps the data into memory. The tensors are written one
by one to safetensors files beside the output, which mlx then reads lazily. Needs torch, the `bin`
extra.
"""

import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mlx_clex.checkpoint.safetensors_file import TensorInfo, write
from mlx_clex.errors import import_extra, reading

from .torch_pickle import read_tensors


def _torch() -> Any:
    return import_extra("torch", "bin", "A checkpoint of .bin files")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return names, types and shapes of the tensors in a .bin file.

    Raises:
        InputError: the file is corrupt, or has something other than tensors; or torch, which
            reads the data, is not installed.
    """
    _torch()
    return {name: tensor.info for name, tensor in read_tensors(path).items()}


def spool(
    path: Path,
    target: Path,
    advance: Callable[[int], object] = lambda _: None,
    names: Collection[str] | None = None,
) -> None:
    """Rewrite a .bin file as safetensors.

    Args:
        path: the .bin file.
        target: the new file.
        advance: called after each tensor with its size in bytes.
        names: the tensors to write; None: all.

    Raises:
        InputError: as `read_header`.
    """
    header = read_header(path)
    torch = _torch()
    with reading(f"{path} is corrupt or truncated. Download or copy it again"):
        # The old format is not a zip file and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if any(tuple(state[name].shape) != info.shape for name, info in header.items()):
            raise ValueError("its pickle can be read in two ways")
    entries = [
        (name, info, _bytes_of(state[name]))
        for name, info in header.items()
        if names is None or name in names
    ]
    write(target, entries, "pt", advance)


def _bytes_of(tensor: Any) -> Callable[[], memoryview]:
    def data() -> memoryview:
        torch = _torch()
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return memoryview(flat.numpy())

    return data
