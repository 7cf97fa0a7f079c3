"""Compute short digests of weights and files.

The digest of weights covers each tensor's name, type and shape and a few of its bytes. It
takes milliseconds for a model of any size and differs for a fine-tuned copy.

Not covered: forgery, and changes outside the sampled bytes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import InputError
from ..scaling import PREFIX
from .safetensors_file import TensorInfo, read_header

_SAMPLES = 4  # samples of a tensor's data
_SAMPLE = 64  # bytes in a sample


def digest_of(parts: Iterable[bytes]) -> str:
    """Return twelve hexadecimal digits of the SHA-256 of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def state_digest(files: list[Path]) -> str:
    """Return twelve digits that change with the path, size or time of a file."""
    stats = ((file.resolve(), file.stat()) for file in files)
    return digest_of(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode() for path, stat in stats)


def weights_digest(folder: Path) -> str:
    """Return twelve digits for the weights of a model, without the tensors of its scaling."""
    return digest_of(weights_samples(sorted(folder.glob("model*.safetensors"))))


def weights_samples(files: list[Path]) -> Iterator[bytes]:
    """Yield what each tensor is known by, in the order of their names, without the scaling's."""
    known = samples_by_name({file: read_header(file) for file in files})
    if files and not known:
        raise InputError(f"{files[0]} holds no tensors.")
    for name in sorted(known):
        if not name.startswith(PREFIX):
            yield name.encode() + known[name]


def samples_by_name(
    headers: Mapping[Path, Mapping[str, TensorInfo]], suffixes: tuple[str, ...] = ("",)
) -> dict[str, bytes]:
    """Return type, shape and a few bytes of tensors in safetensors files.

    Args:
        headers: of the files.
        suffixes: the names of the tensors end with one of these.
    """
    known = {}
    for file, header in headers.items():
        at = file.stat().st_size - sum(info.nbytes for info in header.values())
        with file.open("rb", buffering=0) as data:
            for name, info in header.items():
                last = max(info.nbytes - _SAMPLE, 0)
                for step in range(_SAMPLES if name.endswith(suffixes) else 0):
                    if not step:
                        known[name] = f" {info.dtype} {info.shape}".encode()
                    data.seek(at + last * step // (_SAMPLES - 1))
                    known[name] += data.read(min(_SAMPLE, info.nbytes))
                at += info.nbytes
    return known
