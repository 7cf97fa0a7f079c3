"""Read safetensors files, header first, and write them one tensor at a time.

The header has every name, type and shape, so a conversion can be refused before anything is
written. Writing keeps one tensor in memory, not a whole shard.

Not covered: the weights of whole models, which mlx-lm loads.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import InputError, reading
from .files import open_regular

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64}
_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
}
MLX_TYPES = {name: dtype for dtype, name in _NAMES.items()}
# Bounds of a header, many times those of any model: the text, and the brackets in it, since each
# becomes an object.
_MAX_HEADER = 32_000_000  # bytes
_MAX_TENSORS = 100_000
_MAX_AXES, _MAX_AXIS = 16, (1 << 31) - 1  # of a tensor; mlx stores the size of an axis in 32 bits


class TensorInfo(NamedTuple):
    """Type and shape of a tensor."""

    dtype: str  # the format's own name, such as "BF16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of the data in bytes."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def info_of(array: mx.array) -> TensorInfo:
    """Return type and shape of an array without evaluating it."""
    return TensorInfo(_NAMES[array.dtype], tuple(array.shape))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the checked header of a safetensors file.

    Args:
        path: the file; only its header is read.

    Returns:
        Type and shape of each tensor by name, in the order of the data.

    Raises:
        InputError: the file is truncated, not a safetensors file, or has a type that MLX
            lacks.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise _broken(path, f"its header does not fit into {size} bytes")
        text = file.read(length)
    if text.count(b"{") + text.count(b"[") > 3 * _MAX_TENSORS:
        raise _broken(path, f"its header has more than {_MAX_TENSORS:,} tensors")
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}  # mlx writes null
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata other than texts")
        entries = [(name, *_entry(path, name, value)) for name, value in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise _broken(path, "its header is not readable") from error
    entries.sort(key=lambda entry: entry[2])
    at = 0
    for name, info, begin, end in entries:
        if begin != at or end - begin != info.nbytes:
            raise _broken(path, f"the data of {name} does not match its shape")
        at = end
    if 8 + length + at != size:
        raise _broken(path, f"it should have {8 + length + at} bytes and has {size}")
    return {name: info for name, info, _, _ in entries}


def read_tensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the tensors of a safetensors file, read as they are needed, and its metadata.

    Raises:
        InputError: as `read_header`.
    """
    read_header(path)  # mlx reads data past the end of a file as it is needed
    with reading(f"{path} does not load"):
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    return loaded


def write(
    path: Path,
    tensors: Iterable[tuple[str, TensorInfo, Callable[[], memoryview]]],
    file_format: str,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    Args:
        path: the new file.
        tensors: (name, type and shape, a function that returns the bytes); the functions are
            called in this order.
        file_format: "mlx" or "pt", the metadata entry "format".
        advance: called with the number of bytes of each written tensor.

    Raises:
        OSError: the file exists, or the disk is full.
    """
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": file_format}}
    at = 0
    for name, info, _ in tensors:
        header[name] = {
            "dtype": info.dtype,
            "shape": info.shape,
            "data_offsets": [at, at + info.nbytes],
        }
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info, data in tensors:
            view = data()
            if view.nbytes != info.nbytes:
                raise AssertionError(f"{name}: {view.nbytes} bytes, not {info.nbytes}")
            file.write(view)
            del view  # before the next tensor is made
            advance(info.nbytes)


def array_bytes(array: mx.array, *others: mx.array) -> memoryview:
    """Evaluate an array and return a view of its bytes, which keeps the array alive.

    Args:
        array: the array.
        others: arrays to evaluate with it, which reads what they share only once.
    """
    # Not flattened: mlx stores the size of an axis in 32 bits.
    raw: Any = mx.contiguous(array if array.ndim else array.reshape(1)).view(mx.uint8)
    mx.eval(raw, *others)
    return memoryview(raw)


def _entry(path: Path, name: str, value: dict) -> tuple[TensorInfo, int, int]:
    dtype, shape = value["dtype"], tuple(value["shape"])
    begin, end = value["data_offsets"]
    if dtype not in _BITS:
        raise InputError(
            f"{path.name}: tensor {name} has type {dtype}. mlx_clex reads {', '.join(_BITS)}. "
            "Convert the checkpoint to bfloat16 first."
        )
    whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not whole or len(shape) > _MAX_AXES or max(shape, default=0) > _MAX_AXIS:
        raise ValueError("not a size")
    return TensorInfo(dtype, shape), begin, end


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is corrupt or truncated: {reason}. Download or copy it again.")
