"""Measure what the memory of a model depends on, from its config and the headers of its tensors.

A token's keys and values, the width of a layer and the number of heads come from the lazy model
(`source.py`), so every family of mlx-lm is measured in the same way.

Not covered: how much memory a run takes (`memory.py`).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .. import bundled
from ..checkpoint.safetensors_file import TensorInfo, read_header
from ..errors import InputError
from ..model.plans import single_caches
from ..model.scaled_model import make_prompt_cache, scaled
from ..model.stock import config_value
from .source import Source, build, lacks

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "F32": 4, "F16": 2, "BF16": 2}
GROUP = 64  # values that share a scale and a bias, mlx-lm's default
_LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The cached values of one sequence."""

    growing: int  # of a token, in caches that grow with the text
    largest: int  # of a token, in the largest of these caches
    windows: tuple[tuple[int, int], ...] = ()  # (tokens kept, values of a token) of each window
    fixed: int = 0  # in caches of one size, such as recurrent states
    quantisable: bool = True  # --kv-bits can be used

    def nbytes(
        self, length: int, itemsize: int, kv_bits: int | None = None, group: int = GROUP
    ) -> float:
        """Return the bytes of these caches after `length` tokens.

        Args:
            length: tokens.
            itemsize: bytes of a number that is not quantised.
            kv_bits: bits of a quantised value, or None: they are not quantised.
            group: quantised values that share a scale and a bias.
        """
        value = itemsize if kv_bits is None else kv_bits / 8 + 2 * itemsize / group
        rest = self.fixed + sum(min(length, kept) * values for kept, values in self.windows)
        return self.growing * length * value + rest * itemsize


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the memory of a model depends on."""

    weights: float  # bytes
    itemsize: int  # bytes of a number that is not quantised
    layers: int
    hidden: int  # width of a layer's input
    heads: int  # of queries
    head_dim: int  # of keys, which are compared with queries
    inner: int  # width of the feed-forward part of a layer, of all experts of a token
    vocabulary: int
    caches: Caches
    linear: tuple[tuple[int, int], ...]  # (inputs, outputs) of the linear maps of all layers
    parameters: int  # numbers in all layers
    scaled: bool  # it has a scaling, so long passes are read in parts
    learns_scaling: bool  # its scaling has tensors, which are trained by default
    reach: int | None  # tokens the model is made for

    @property
    def queries(self) -> int:
        """Return the width of a token's queries in a layer."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Return the width of a token's keys in a layer; values are taken to be as wide."""
        return self.caches.largest // 2

    def shared(self, processes: int) -> "Sizes":
        """Return the sizes for one of several processes that share the weights and caches."""
        caches = replace(self.caches, growing=self.caches.growing // processes)
        return replace(self, weights=self.weights / processes, caches=caches)


def sizes_of(source: Source, q_bits: int | None = None, model: nn.Module | None = None) -> Sizes:
    """Return the sizes of a model that is not loaded.

    Args:
        source: where the model is.
        q_bits: bits of its weights after quantising, or None: as they are.
        model: what `build` made of it, if it is there already.

    Raises:
        InputError: its config does not make a model, or lacks a size.
    """
    model = model or build(source)
    header = _header(source.path)
    itemsize = _itemsize(source, header)
    quantisation = source.config.get("quantization") or {}
    bits = q_bits or quantisation.get("bits")
    if header and q_bits is None:
        weights: float = sum(info.nbytes for info in header.values())
        if source.path is not None and source.path.parent == bundled.FOLDER:
            weights *= 2  # loaded in float32, see `load`
    else:
        weights = _weight_bytes(model, itemsize, bits, quantisation.get("group_size", GROUP))
    return replace(sizes_of_model(model), weights=weights, itemsize=itemsize)


def sizes_of_model(model: nn.Module) -> Sizes:
    """Return the sizes of a model, loaded or lazy.

    Raises:
        InputError: its config lacks a size.
    """
    layers: list[nn.Module] = model.layers
    modules = [module for layer in layers for module in layer.modules()]
    linear = [_linear(module, model) for module in modules if isinstance(module, _LINEAR)]
    hidden = config_value(model, "hidden_size")
    if hidden is None and linear:
        # Most maps of a layer take its input.
        hidden = Counter(inputs for inputs, _ in linear).most_common(1)[0][0]
    if hidden is None:
        raise lacks("hidden_size")
    heads = next((n for name in _HEADS if (n := config_value(model, name))), None)
    if heads is None:
        raise lacks(_HEADS[0])
    vocabulary = config_value(model, "vocab_size")
    if vocabulary is None:
        raise lacks("vocab_size")
    caches, head_dim = caches_of(model)
    scaling = scaled(model).scaling
    arrays: Any = tree_flatten(model.parameters())
    floats = [a.dtype.size for _, a in arrays if mx.issubdtype(a.dtype, mx.floating)]
    return Sizes(
        weights=sum(a.nbytes for _, a in arrays),
        itemsize=Counter(floats).most_common(1)[0][0],
        layers=len(layers),
        hidden=hidden,
        heads=heads,
        head_dim=head_dim or hidden // heads,
        inner=max((inputs for inputs, _ in linear), default=hidden),
        vocabulary=vocabulary,
        caches=caches,
        linear=tuple(linear),
        parameters=sum(
            value.size
            for module in modules
            for name, value in module.items()
            if isinstance(value, mx.array) and not name.startswith("_")
        ),
        scaled=scaling is not None,
        learns_scaling=scaling is not None
        and bool(scaling.learned and scaling.learning_rate_share),
        reach=scaled(model).reach,
    )


def caches_of(model: nn.Module) -> tuple[Caches, int]:
    """Return the cached values of a token, and the width of one key.

    Two tokens are read lazily: nothing is computed.
    """
    caches = make_prompt_cache(model)
    model(mx.array([[0, 1]]), cache=caches)
    growing: list[int] = []
    windows: list[tuple[int, int]] = []
    fixed = width = 0
    quantisable = True
    for cache in single_caches(caches):
        arrays = [array for _, array in _flat(cache.state)]
        cached = [a for a in arrays if a.ndim == 4]
        values = sum(math.prod((*a.shape[:2], a.shape[3])) for a in cached)
        if isinstance(cache, KVCache):
            growing.append(values)
            quantisable = quantisable and all(a.shape[-1] % GROUP == 0 for a in cached)
            width = max([width, *(a.shape[-1] for a in cached[:1])])
        elif isinstance(cache, RotatingKVCache):
            windows.append((getattr(cache, "max_size", 0), values))
        else:
            fixed += sum(a.size for a in arrays)
    found = Caches(
        growing=sum(growing),
        largest=max(growing, default=0),
        windows=tuple(windows),
        fixed=fixed,
        quantisable=quantisable and bool(growing),
    )
    return found, width


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(tree)
    return [(name, array) for name, array in flat if isinstance(array, mx.array)]


def _linear(module: Any, model: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear map, of all experts of a token together."""
    outputs, inputs = module.weight.shape[-2:]
    if "bits" in vars(module):
        inputs = inputs * 32 // module.bits
    experts = 1
    if module.weight.ndim == 3:
        experts = config_value(model, "num_experts_per_tok") or 1
    return experts * inputs, experts * outputs


def _header(path: Path | None) -> dict[str, TensorInfo]:
    """Return type and shape of the tensors in the safetensors files of a folder."""
    if path is None or not path.is_dir():
        return {}
    found: dict[str, TensorInfo] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            if not file.name.startswith("."):
                found |= read_header(file)
    except InputError:
        return {}  # loading says what is wrong with it; the shapes of the model are known
    return found


def _itemsize(source: Source, header: dict[str, TensorInfo]) -> int:
    """Return the bytes of most numbers that are not quantised, once the model is loaded."""
    if source.path is not None and source.path.parent == bundled.FOLDER:
        return 4  # see `load`
    types = Counter(info.dtype for info in header.values() if info.dtype in _ITEM_BYTES)
    if types:
        return _ITEM_BYTES[types.most_common(1)[0][0]]
    name = source.config.get("torch_dtype") or source.config.get("dtype")
    return _ITEM_BYTES.get(str(name), 4)


def _weight_bytes(model: nn.Module, itemsize: int, bits: int | None, group: int) -> float:
    """Return the bytes of a model's weights from their shapes."""
    total = 0.0
    for module in model.modules():
        for name, array in module.items():
            if not isinstance(array, mx.array):
                continue
            linear = name == "weight" and hasattr(module, "to_quantized")
            if bits is not None and linear and array.shape[-1] % group == 0:
                total += array.size * (bits / 8 + 4 / group)
            else:
                total += array.size * itemsize
    return total
