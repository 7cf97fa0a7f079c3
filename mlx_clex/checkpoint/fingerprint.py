"""What a saved cache belongs to: a model, an adapter, a scaling.

A fingerprint is a handful of short texts, so that two of them can be told apart in words.
Weights are known by every tensor's name, type and shape and by a few of its bytes: some
milliseconds for a model of any size, and a fine-tuned copy of a model still differs.

Not covered: forgery, and changes of a tensor that spare all the bytes looked at.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..loading import EXTRA_WEIGHTS, adapter_files, read_config
from ..model.scaled_model import ScaledModel
from ..scaling import PREFIX, SCALINGS
from .config import normalise_config
from .safetensors_file import read_header

Fingerprint = dict[str, str]

_SAMPLES = 4  # places in the data of a tensor that are looked at
_SAMPLE = 64  # bytes at each of them

# Of config.json, what no answer depends on, or is told apart by its own name below.
_NOT_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "max_position_embeddings",
    "model_file",
    "rope_scaling",
    "transformers_version",
}


def fingerprint(
    model: nn.Module, folder: Path, adapter_path: str | Path | None = None
) -> Fingerprint:
    """What an answer of this model depends on, beside the text.

    Args:
        model: as loaded.
        folder: the converted or plain folder that it was loaded from.
        adapter_path: the adapters on top of it.

    Returns:
        Texts by name, in the order in which differences are worth telling.
    """
    config = normalise_config(read_config(folder))
    own = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    entry, tensors, length = (
        config.get("rope_scaling"),
        "none",
        config.get("max_position_embeddings"),
    )
    if isinstance(model, ScaledModel):
        scaling = model.scaling
        (name,) = (name for name, kind in SCALINGS.items() if kind is type(scaling))
        entry = {"type": name, **asdict(scaling.config)}
        length = scaling.trained_length
        if scaling.learned:
            tensors = _digest(_bytes_of(scaling[learned]) for learned in scaling.learned)
    return {
        "config.json": _digest([_text(own).encode()]),
        "weights": weights_digest(folder),
        "adapter": _adapter(adapter_path),
        "rope_scaling": _text(entry),
        "learned tensors of the scaling": tensors,
        "fixed scale": _text(getattr(model, "fixed_scale", None)),
        "trained length": _text(length),
    }


def weights_digest(folder: Path) -> str:
    """Twelve digits that stand for the weights of a model, its scaling's left aside."""
    return _digest(_weights(sorted(folder.glob("model*.safetensors"))))


def difference(there: Fingerprint, here: Fingerprint) -> str:
    """In words, what two fingerprints do not share; empty where they are the same."""
    return "; ".join(
        f"{name}: {there.get(name, 'unknown')} there, {text} here"
        for name, text in here.items()
        if there.get(name) != text
    )


def digest(of: Fingerprint) -> str:
    """Twelve digits that stand for a fingerprint, where nobody needs to hear what differs."""
    return _digest([_text(of).encode()])


def _text(value: Any) -> str:
    return "none" if value is None else json.dumps(value, sort_keys=True)


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def _bytes_of(array: mx.array) -> bytes:
    return np.array(array).tobytes()


def _adapter(path: str | Path | None) -> str:
    if path is None:
        return "none"
    folder = adapter_files(Path(path))
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    what = {key: settings.get(key) for key in ("fine_tune_type", "lora_parameters", "num_layers")}
    files = [folder / "adapters.safetensors", folder / EXTRA_WEIGHTS]
    return _digest([_text(what).encode(), *_weights([file for file in files if file.is_file()])])


def _weights(files: list[Path]) -> Iterator[bytes]:
    """Of every tensor but the scaling's, in the order of their names, what it is known by."""
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
                known[name] = f"{name} {info.dtype} {info.shape}".encode() + b"".join(samples)
                at += info.nbytes
    if files and not known:
        raise InputError(f"{files[0]} holds no tensors.")
    for name in sorted(known):
        if not name.startswith(PREFIX):
            yield known[name]
