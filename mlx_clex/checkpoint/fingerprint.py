"""Identify the model, adapters and scaling that a prompt cache or a result belongs to.

A fingerprint is a dict of short texts by name, so an error can name what differs.

Not covered: forgery, and changes that `digest.py` does not detect.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.scaled_model import scaled
from .adapters import read_adapters, tensor_files
from .config import normalise_config
from .digest import digest_of, weights_digest, weights_samples
from .folder import read_config
from .peft_adapters import PEFT_SETTINGS

Fingerprint = dict[str, str]

# Keys of config.json that do not affect the output or have their own fingerprint entry.
_NOT_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "max_position_embeddings",
    "model_file",
    "rope_scaling",
    "transformers_version",
}


_NAME = "model"  # for messages only: copies of a model may have different names
_BASE = ("config.json", "weights")


def fingerprint(
    model: nn.Module, folder: Path, adapter_path: str | Path | None = None
) -> Fingerprint:
    """Return everything except the prompt that a model's output depends on.

    Args:
        model: the loaded model.
        folder: the folder that it was loaded from.
        adapter_path: the folder of its adapters, if any.

    Returns:
        Texts by name; the most important differences come first.
    """
    config = normalise_config(read_config(folder))
    own = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    view = scaled(model)
    entry, tensors = config.get("rope_scaling"), "none"
    if view.scaling is not None:
        entry = view.scaling.entry()
        if view.scaling.learned:
            tensors = digest_of(_bytes_of(view.scaling[name]) for name in view.scaling.learned)
    base: dict[str, str] = {}
    if view.scaling is not None and view.scaling.shape.inv_freq is not None:
        shape = view.scaling.shape
        base["rope of the base"] = digest_of([_text([shape.inv_freq, shape.gain]).encode()])
    return base | {
        _NAME: folder.resolve().name,
        "config.json": digest_of([_text(own).encode()]),
        "weights": weights_digest(folder),
        "adapter": _adapter(adapter_path),
        "rope_scaling": _text(entry),
        "learned tensors of the scaling": tensors,
        "fixed scale": _text(view.fixed_scale),
        "trained length": _text(view.trained_length),
    }


def difference(there: Fingerprint, here: Fingerprint) -> str:
    """Return a text that says how two fingerprints differ; empty if they are equal.

    Args:
        there: the fingerprint in a file.
        here: the fingerprint of the loaded model.
    """
    differing = [name for name in here if name != _NAME and there.get(name) != here[name]]
    if not differing:
        return ""
    if not set(differing).isdisjoint(_BASE):
        made, asked = there.get(_NAME, "an unknown model"), here[_NAME]
        if made != asked:
            return f"made with {made}; you asked for {asked}"
        changed = " and ".join(name for name in differing if name in _BASE)
        return f"made with another version of {made} (different {changed})"
    return "; ".join(
        f"{name}: {there.get(name, 'unknown')} in the file, {here[name]} in this model"
        for name in differing
    )


def short(fingerprint: Fingerprint) -> str:
    """Return twelve digits that identify a fingerprint."""
    return digest_of([_text({k: v for k, v in fingerprint.items() if k != _NAME}).encode()])


def _text(value: Any) -> str:
    return "none" if value is None else json.dumps(value, sort_keys=True)


def _bytes_of(array: mx.array) -> bytes:
    return np.array(array).tobytes()


def _adapter(path: str | Path | None) -> str:
    if path is None:
        return "none"
    folder, settings = read_adapters(Path(path))
    keys = ("fine_tune_type", "lora_parameters", "num_layers")
    what = {key: settings.get(key) for key in keys}
    what |= {key: settings[key] for key in PEFT_SETTINGS if key in settings}
    return digest_of([_text(what).encode(), *weights_samples(tensor_files(folder))])
