"""Copies of golden checkpoints, and what is in their files."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
import transformers

from .conftest import GOLDEN


def read_tensors(folder: Path) -> dict[str, Any]:
    """All weights of a folder, .bin shards too."""
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        loaded: Any = mx.load(str(file))
        tensors |= loaded
    for file in sorted(folder.glob("pytorch_model*.bin")):
        for name, tensor in torch.load(file, weights_only=True).items():
            tensors[name] = mx.array(tensor.float().numpy()).astype(mx.bfloat16)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def copy_golden(name: str, tmp_path: Path) -> Path:
    target = tmp_path / name
    shutil.copytree(GOLDEN / name, target, ignore=shutil.ignore_patterns("golden.*"))
    return target


def torch_cache(model):
    """A fresh KV cache as the keyword argument that this version of transformers takes."""
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    return {name: transformers.DynamicCache()}
