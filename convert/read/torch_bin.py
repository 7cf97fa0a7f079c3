"""Rewrite pytorch_model.bin shards as safetensors.

A .bin file is a pickle. torch reads it with `weights_only=True`, which runs no code, and maps the
data into memory. The tensors are written one by one to safetensors files beside the output, which
mlx then reads lazily. Needs torch, the `bin` extra.
"""

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_clex.checkpoint.safetensors_file import TensorInfo, write
from mlx_clex.errors import InputError

_NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def import_torch(reason: str = "This checkpoint has only .bin files, which need torch") -> Any:
    """Return the module torch.

    Args:
        reason: start of the error message, what needs torch.

    Raises:
        InputError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{reason}: pip install 'mlx-clex[bin]'.") from error
    return torch


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return names, types and shapes of the tensors in a .bin file.

    Raises:
        InputError: the file is corrupt, or has something other than tensors.
    """
    return {name: info for name, info, _ in _entries(path)}


def spool(path: Path, target: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Rewrite a .bin file as safetensors.

    Args:
        path: the .bin file.
        target: the new file.
        advance: called after each tensor with its size in bytes.

    Raises:
        InputError: the file is corrupt, or has something other than tensors.
    """
    write(target, _entries(path), "pt", advance)


def _entries(path: Path) -> list[tuple[str, TensorInfo, Callable[[], memoryview]]]:
    entries = []
    size = path.stat().st_size
    for name, tensor in _load(path).items():
        if isinstance(name, str) and _is_plain(tensor):
            if tensor.nbytes > size:
                raise InputError(
                    f"{path}: the tensor {name} has {tensor.nbytes} bytes, more than the whole "
                    "file. The file is damaged: download or copy it again."
                )
            info = TensorInfo(_NAMES[str(tensor.dtype)], tuple(tensor.shape))
            entries.append((name, info, _bytes_of(tensor)))
        else:
            raise InputError(
                f"{path} has {name!r}, a {type(tensor).__name__}; only tensors of numbers are "
                "allowed. Is it a checkpoint of weights?"
            )
    return entries


def _is_plain(tensor: Any) -> bool:
    """Return whether this is a dense CPU tensor of a type that safetensors has."""
    return (
        str(getattr(tensor, "dtype", None)) in _NAMES
        and str(tensor.layout) == "torch.strided"
        and str(tensor.device) == "cpu"
        and not (tensor.is_nested or tensor.is_neg() or tensor.is_conj())
    )


def _check_records(path: Path, state: dict[Any, Any]) -> None:
    """Refuse a zip file with records shorter than the tensors' storages.

    When torch maps the file, it reads on past the end of a short record.
    """
    with zipfile.ZipFile(path) as archive:
        records = Counter(
            info.file_size for info in archive.infolist() if "/data/" in f"/{info.filename}"
        )
    plain = [tensor for tensor in state.values() if _is_plain(tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in plain}
    missing = Counter(storage.nbytes() for storage in storages.values()) - records
    if missing:
        raise InputError(
            f"{path} is corrupt or truncated: no record has the {min(missing)} bytes of one of its "
            "tensors. Download or copy it again."
        )


def _bytes_of(tensor: Any) -> Callable[[], memoryview]:
    def data() -> memoryview:
        torch = import_torch()
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return memoryview(flat.numpy())

    return data


def _load(path: Path) -> dict[Any, Any]:
    torch = import_torch()
    # The old format is not a zip file and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise InputError(
                f"{path} asks to run {wanted[1]}; mlx_clex never runs code of a checkpoint. Get "
                "the weights as safetensors."
            ) from error
        raise _corrupt(path, error) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _corrupt(path, error) from error
    if not isinstance(state, dict):
        raise InputError(f"{path} has a {type(state).__name__}, not a dictionary of tensors.")
    if mapped:
        _check_records(path, state)
    return state


def _corrupt(path: Path, error: Exception) -> InputError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0].rstrip(".")[:200] if lines else type(error).__name__
    return InputError(f"{path} is corrupt or truncated: {reason}. Download or copy it again.")
