"""Read names, types and shapes out of a pytorch_model.bin file, without torch.

The file is a pickle, with its data behind it or beside it in a zip archive. A pickle is a program:
one of a kilobyte can ask for gigabytes. So its opcodes are held against a list before anything
reads it, the functions that it may call stand for values here, and all sizes are held against the
file's.

Not covered: the data (`torch_bin.py`), and archives older than PyTorch 0.4.
"""

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mlx_clex.checkpoint.files import open_regular
from mlx_clex.checkpoint.safetensors_file import TensorInfo
from mlx_clex.errors import InputError, reading

_MOST_TENSORS = 20_000  # in a file; published files have up to 2,000
_MOST_PICKLE = 200 * _MOST_TENSORS  # bytes; a tensor takes 150
_MOST_OPCODES = 30 * _MOST_TENSORS  # a tensor takes 25
_MOST_DIRECTORY = 200 * _MOST_TENSORS  # bytes of an archive's list of records
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# What torch.save writes for tensors, and torch.load(weights_only=True) takes.
_OPCODES = """
    PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND
    APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET
"""


class Tensor(NamedTuple):
    """What a pickle says of a tensor."""

    storage: Any
    offset: int  # of its first number in the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        """Return type and shape."""
        return TensorInfo(self.storage.dtype, self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are in its storage."""
        sizes = (*self.shape, *self.stride, self.offset)
        if len(self.shape) != len(self.stride) or not all(type(n) is int and n >= 0 for n in sizes):
            return False
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return 0 in self.shape or self.offset + last < self.storage.length


class _Storage(NamedTuple):
    dtype: str
    key: str  # name of its record in an archive
    length: int  # numbers

    @property
    def nbytes(self) -> int:
        return TensorInfo(self.dtype, (self.length,)).nbytes


class _Kind(NamedTuple):
    dtype: str


def _rebuild_tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without data")
    return Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_CALLED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _Kind(dtype) for name, dtype in _STORAGES.items()},
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .bin file by name.

    Raises:
        InputError: the file is corrupt, has something other than tensors, or asks for more than
            it holds.
    """
    with reading(f"{path} is corrupt or truncated. Download or copy it again"):
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):
                state, records = _from_archive(path, file)
            else:
                state, records = _from_stream(path, file)
        if not isinstance(state, dict):
            raise InputError(f"{path} has a {type(state).__name__}, not a dictionary of tensors.")
        if len(state) > _MOST_TENSORS:
            raise _too_many(path)
        for name, tensor in state.items():
            _check(path, name, tensor, records)
        return dict(state)


def _check(path: Path, name: Any, tensor: Any, records: dict[str, int]) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise InputError(
            f"{path} has {name!r:.80}, a {type(tensor).__name__}; only tensors of numbers are "
            "allowed. Is it a checkpoint of weights?"
        )
    storage = tensor.storage
    if records.get(storage.key) != storage.nbytes or not tensor.is_whole:
        raise InputError(
            f"{path} is corrupt or truncated: no record has the {storage.nbytes} bytes of the "
            f"tensor {name}. Download or copy it again."
        )
    size = path.stat().st_size
    if tensor.info.nbytes > size:
        raise InputError(
            f"{path}: the tensor {name} has {tensor.info.nbytes} bytes, more than the whole file. "
            "The file is damaged: download or copy it again."
        )


def _from_archive(path: Path, file: BinaryIO) -> tuple[Any, dict[str, int]]:
    """Return the pickled value of an archive, and the size of each record of data."""
    private: Any = zipfile  # its public names read the whole directory first
    end = private._EndRecData(file)
    if end is None or end[5] > _MOST_DIRECTORY:
        raise _too_many(path)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        size = os.fstat(file.fileno()).st_size
        packed = any(info.compress_type != zipfile.ZIP_STORED for info in infos)
        if packed or sum(info.file_size for info in infos) > size:
            raise InputError(
                f"{path} is an archive of compressed records, or of more bytes than it has. Save "
                "the weights with torch.save."
            )
        if len({info.filename for info in infos}) < len(infos):
            raise InputError(f"{path} has two records of one name. Download or copy it again.")
        (head,) = (info for info in infos if f"/{info.filename}".endswith("/data.pkl"))
        top = head.filename.removesuffix("data.pkl") + "data/"
        records = {info.filename.removeprefix(top): info.file_size for info in infos}
        if head.file_size > _MOST_PICKLE:
            raise _too_many(path)
        return _unpickle(path, io.BytesIO(archive.read(head))), records


def _from_stream(path: Path, file: BinaryIO) -> tuple[Any, dict[str, int]]:
    """Return the pickled value of a file in torch's old format, and the size of each storage."""
    file.seek(0)
    head = io.BytesIO(file.read(_MOST_PICKLE))
    storages: dict[str, _Storage] = {}
    # A number that marks the format, its version, the machine; the value; names of the storages.
    _, _, _, state, keys = (_unpickle(path, head, storages) for _ in range(5))
    at = head.tell() + sum(8 + storages[key].nbytes for key in keys)
    if at > os.fstat(file.fileno()).st_size or len(set(keys)) < len(keys):
        raise ValueError("its data is cut short")
    return state, {key: storages[key].nbytes for key in keys}


def _unpickle(path: Path, file: io.BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """Return the value of one pickle whose opcodes are all allowed."""
    start = file.tell()
    allowed = set(_OPCODES.split())
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "GLOBAL":
            _check_global(path, argument)
        if opcode.name not in allowed:
            raise InputError(
                f"{path} has the pickle opcode {opcode.name}, which files of tensors do not have. "
                "It is corrupt or hostile: get the weights as safetensors."
            )
        if opcode.name == "LONG_BINPUT" and argument > _MOST_PICKLE:
            raise ValueError("a number in it is too large")
        if count > _MOST_OPCODES:
            raise _too_many(path)
    file.seek(start)
    return _Unpickler(file, {} if storages is None else storages).load()


def _check_global(path: Path, argument: str) -> None:
    module, _, name = argument.partition(" ")
    if (module, name) in _CALLED:
        return
    if module.partition(".")[0] == "torch":
        raise InputError(
            f"{path} has {module}.{name}; only tensors of numbers are allowed. Get the weights as "
            "safetensors."
        )
    raise InputError(
        f"{path} asks to run {module}.{name}; mlx_clex never runs code of a checkpoint. Get the "
        "weights as safetensors."
    )


def _too_many(path: Path) -> InputError:
    return InputError(
        f"{path} has more than {_MOST_TENSORS:,} tensors or other objects. Is it a checkpoint of "
        "weights?"
    )


class _Unpickler(pickle.Unpickler):
    """Builds descriptions in place of tensors; no name outside `_CALLED` is looked up."""

    def __init__(self, file: io.BytesIO, storages: dict[str, _Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        return _CALLED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        word, kind, key, _, count, *_ = pid
        if word != "storage" or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a reference to something other than data")
        storage = _Storage(kind.dtype, str(key), count)
        if self._storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError("two sizes of one record")
        return storage
