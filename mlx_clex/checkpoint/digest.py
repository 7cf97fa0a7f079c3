"""Short digests of weights and files.

Weights are known by every tensor's name, type and shape and by a few of its bytes: some
milliseconds for a model of any size, and a fine-tuned copy of a model still differs.

Not covered: forgery, and changes of a tensor that spare all the bytes looked at.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import InputError
from ..scaling import PREFIX
from .safetensors_file import read_header

_SAMPLES = 4  # places in the data of a tensor that are looked at
_SAMPLE = 64  # bytes at each of them


def digest_of(parts: Iterable[bytes]) -> str:
    """Return twelve hexadecimal digits of the SHA-256 of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def state_digest(files: list[Path]) -> str:
    """Return twelve digits that change when one of the files does: name, size or time."""
    stats = ((file.resolve(), file.stat()) for file in files)
    return digest_of(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode() for path, stat in stats)


def weights_digest(folder: Path) -> str:
    """Twelve digits that stand for the weights of a model, its scaling's left aside."""
    return digest_of(weights_samples(sorted(folder.glob("model*.safetensors"))))


def weights_samples(files: list[Path]) -> Iterator[bytes]:
    """Yield what each tensor is known by, in the order of their names, without the scaling's."""
    known = samples_by_name(files)
    if files and not known:
        raise InputError(f"{files[0]} holds no tensors.")
    for name in sorted(known):
        if not name.startswith(PREFIX):
            yield name.encode() + known[name]


def samples_by_name(files: list[Path]) -> dict[str, bytes]:
    """Return type, shape and a few bytes of every tensor in safetensors files."""
    known = {}
    for file in files:
        header = read_header(file)
        at = file.stat().st_size - sum(info.nbytes for info in header.values())
        with file.open("rb", buffering=0) as data:
            for name, info in header.items():
                samples = []
                last = max(info.nbytes - _SAMPLE, 0)
                for step in range(_SAMPLES):
                    data.seek(at + last * step // (_SAMPLES - 1))
                    samples.append(data.read(min(_SAMPLE, info.nbytes)))
                known[name] = f" {info.dtype} {info.shape}".encode() + b"".join(samples)
                at += info.nbytes
    return known
