"""Rewrite .gguf files as safetensors.

The package `gguf` maps the file into memory and decodes one tensor at a time. Quantised weights
become float16, floats keep their type; names and the order of rows become Hugging Face's.

Not covered: what differs by architecture (`gguf_families.py`), experts, and the tokenizer
(`gguf_tokenizer.py`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_clex.checkpoint.files import open_regular
from mlx_clex.checkpoint.safetensors_file import TensorInfo, write
from mlx_clex.errors import InputError, import_extra, reading

from .gguf_families import FAMILIES, Family, llama3_rope

_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # kept as stored
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}  # other files become float16
_CONTROL = 3  # token_type of tokens that no text has
_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")  # of turns, as in llama.cpp
_CHUNK = 1 << 22  # elements decoded at once: float32 work arrays of 16 MB
_LONGEST_ARRAY = 1 << 23  # elements of a metadata array; the largest vocabularies have 300,000
_ROPES = ("none", "linear", "yarn")  # values of rope.scaling.type that are read


class GgufFile(NamedTuple):
    """The parsed header of a .gguf file."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[Any]  # gguf.ReaderTensor

    @property
    def family(self) -> Family:
        """The architecture.

        Raises:
            InputError: it is not read.
        """
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in FAMILIES:
            raise InputError(
                f"{self.path} has the architecture {name!r}. .gguf files are read of: "
                f"{', '.join(FAMILIES)}. Use the model's safetensors."
            )
        return FAMILIES[name]

    def key(self, name: str, default: Any = None) -> Any:
        """Return a value of the architecture's metadata.

        Raises:
            InputError: it is missing and has no default.
        """
        name = f"{self.metadata['general.architecture']}.{name}"
        value = self.metadata.get(name, default)
        if value is None:
            raise InputError(f"{self.path} has no {name} in its metadata.")
        return value


def read(path: Path) -> GgufFile:
    """Parse the header of a .gguf file.

    Raises:
        InputError: the file is no GGUF, is cut off, or has a type that is not read.
    """
    with reading(f"{path} is corrupt or truncated. Download or copy it again"):
        open_regular(path).close()
        reader = _bounded_reader(import_extra("gguf", "gguf", f"Reading {path}"))(path)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
    if reader.byte_order != "I":
        raise InputError(
            f"{path} is big-endian, which mlx_clex does not read. Use the model's safetensors."
        )
    end = 0
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        _check_tensor(path, tensor)
        if tensor.data_offset % reader.alignment or tensor.data_offset < end:
            raise _broken(path, f"the data of {tensor.name} is not where it can be")
        end = tensor.data_offset + tensor.n_bytes
    return GgufFile(path, metadata, reader.tensors)


def config_of(gguf: GgufFile) -> dict[str, Any]:
    """Return the file's metadata as a config.json.

    Raises:
        InputError: another architecture, an unsupported feature, or metadata of wrong types.
    """
    with reading(f"{gguf.path} has metadata with wrong values. Download or copy it again"):
        return _config_of(gguf)


def _config_of(gguf: GgufFile) -> dict[str, Any]:
    family, key, metadata = gguf.family, gguf.key, gguf.metadata
    tensors = {tensor.name: tensor for tensor in gguf.tensors}
    if key("expert_count", 0):
        raise InputError(f"{gguf.path} is a mixture of experts; use its safetensors.")
    largest = max(gguf.tensors, key=lambda tensor: int(tensor.n_elements), default=None)
    heads, width = key("attention.head_count"), key("embedding_length")
    head_dim = key("attention.key_length", width // heads)
    if key("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{gguf.path} rotates only part of a head; use its safetensors.")
    config = {
        "model_type": family.model_type,
        "architectures": [family.model_class],
        "hidden_size": width,
        "num_hidden_layers": key("block_count"),
        "intermediate_size": key("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": round(key("attention.layer_norm_rms_epsilon"), 9),
        "max_position_embeddings": key("context_length"),
        "rope_theta": key("rope.freq_base", 10_000.0),
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())) or key("vocab_size"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(metadata),
        "torch_dtype": _DTYPES.get(largest.tensor_type.name if largest else "", "float16"),
    }
    if (window := key("attention.sliding_window", 0)) > 0:
        config["sliding_window"] = window
    config |= family.constants(config)
    if rope := _rope_of(gguf, config["rope_theta"], tensors.get("rope_freqs.weight")):
        config["rope_scaling"] = rope
    return config


def _ends(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """Return the tokens that end an answer: of the text, of a turn, of a message."""
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    found += [
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _ENDS
    ]
    ends = list(dict.fromkeys(end for end in found if end is not None))
    return ends if len(ends) > 1 else next(iter(ends), None)


def _rope_of(gguf: GgufFile, theta: float, divisors: Any) -> dict[str, Any] | None:
    """Return the file's rope_scaling entry, or None for a plain rope."""
    if divisors is not None:
        entry = llama3_rope(decode(divisors.data, divisors.tensor_type).astype(np.float64), theta)
        if entry is None:
            raise InputError(
                f"{gguf.path} has rotary frequencies (rope_freqs.weight) that are not those of "
                "Llama 3. Use the model's safetensors."
            )
        return entry
    kind = gguf.key("rope.scaling.type", _ROPES[0])
    if kind not in _ROPES:
        raise InputError(f"{gguf.path} has rope scaling {kind!r}. Allowed: {', '.join(_ROPES)}.")
    if kind == _ROPES[0]:
        return None
    entry = {"type": kind, "factor": gguf.key("rope.scaling.factor")}
    if original := gguf.key("rope.scaling.original_context_length", 0):
        entry["original_max_position_embeddings"] = original
    return entry


def header(gguf: GgufFile) -> dict[str, TensorInfo]:
    """Return the names and shapes that `spool` writes.

    Raises:
        InputError: a tensor that the architecture does not have.
    """
    return {_rename(gguf, tensor): _info(tensor) for tensor in _weights(gguf)}


def bits_per_weight(gguf: GgufFile) -> float:
    """Return the mean size of a weight in the file, in bits."""
    elements = sum(int(tensor.n_elements) for tensor in gguf.tensors)
    return 8 * sum(int(tensor.n_bytes) for tensor in gguf.tensors) / max(elements, 1)


def spool(gguf: GgufFile, target: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Rewrite the tensors as safetensors, one in memory at a time.

    Args:
        gguf: the parsed file.
        target: the new file.
        advance: called after each tensor with its size in bytes.
    """
    family, heads = gguf.family, gguf.key("attention.head_count")
    key_heads = gguf.key("attention.head_count_kv", heads)

    def data(tensor: Any) -> Callable[[], memoryview]:
        def read_tensor() -> memoryview:
            array = decode(tensor.data, tensor.tensor_type)
            if family.paired and ".attn_q." in tensor.name:
                array = unpermute(array, heads)
            elif family.paired and ".attn_k." in tensor.name:
                array = unpermute(array, key_heads)
            elif family.norm_shift and tensor.name.endswith("norm.weight"):
                if array.dtype == np.uint16:
                    raise InputError(
                        f"{gguf.path}: {tensor.name} is bfloat16. Allowed: F32, F16. Use the "
                        "model's safetensors."
                    )
                array = array - array.dtype.type(family.norm_shift)
            return np.ascontiguousarray(array).data.cast("B")

        return read_tensor

    entries = [(_rename(gguf, t), _info(t), data(t)) for t in _weights(gguf)]
    write(target, entries, "pt", advance)


def decode(data: np.ndarray, kind: Any) -> np.ndarray:
    """Turn the stored bytes of a tensor into numbers, a few rows at a time.

    Args:
        data: data mapped by the package gguf: floats, or uint8 with whole blocks in each row.
        kind: gguf.GGMLQuantizationType.

    Returns:
        An array of the same rows: floats as stored (uint16 holds the bits of bfloat16), decoded
        blocks as float16.
    """
    if kind.name in _FLOATS:
        return data.view(_FLOATS[kind.name])
    return np.concatenate(list(_decoded(data.reshape(-1, data.shape[-1]), kind))).reshape(
        *data.shape[:-1], -1
    )


def _decoded(rows: np.ndarray, kind: Any) -> Iterator[np.ndarray]:
    package = import_extra("gguf", "gguf", "Decoding a .gguf file")
    block, nbytes = package.GGML_QUANT_SIZES[kind]
    step = max(1, _CHUNK // (rows.shape[-1] // nbytes * block))
    for start in range(0, len(rows), step):
        part = package.quants.dequantize(rows[start : start + step], kind)
        with np.errstate(over="ignore"):  # the converter refuses values that are not finite
            yield part.astype(np.float16)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows: neighbouring pairs become two halves of a head.

    Args:
        rows: the weight of a query or key projection, (H * head_dim, width).
        heads: H.

    Returns:
        The same rows in Hugging Face's order.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _weights(gguf: GgufFile) -> list[Any]:
    """Return the tensors that become weights; the config has the others."""
    return [tensor for tensor in gguf.tensors if tensor.name != "rope_freqs.weight"]


def _rename(gguf: GgufFile, tensor: Any) -> str:
    name, _, kind = tensor.name.rpartition(".")
    if kind in ("weight", "bias"):
        for pattern, theirs in gguf.family.table.items():
            if match := re.fullmatch(pattern, name):
                return f"{theirs.format(*match.groups())}.{kind}"
    raise InputError(
        f"{gguf.path} has the tensor {tensor.name}, which {gguf.family.model_type} does not have."
    )


def _info(tensor: Any) -> TensorInfo:
    name = tensor.tensor_type.name
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return TensorInfo(name if name in _FLOATS else "F16", shape)


def _check_tensor(path: Path, tensor: Any) -> None:
    """Refuse a type that cannot be decoded, and empty or huge shapes."""
    package = import_extra("gguf", "gguf", f"Reading {path}")
    kind = tensor.tensor_type
    traits = package.quants._type_traits  # the types that `dequantize` knows
    if kind.name not in _FLOATS and kind not in traits:
        known = ", ".join(
            [*_FLOATS, *(known.name for known in traits if known.name not in _FLOATS)]
        )
        raise InputError(
            f"{path}: tensor {tensor.name} has type {kind.name}. Allowed: {known}. Use a file of "
            "one of these types, or the model's safetensors."
        )
    if not len(tensor.shape) or 0 in tensor.shape or tensor.n_bytes > path.stat().st_size:
        raise _broken(path, f"the shape of {tensor.name} does not fit its data")


def _bounded_reader(package: Any) -> Any:
    """Return a subclass of the reader that refuses headers which point past the file."""

    class Reader(package.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: Any = 1, *_: Any, **__: Any) -> Any:
            # np.frombuffer raises past the end of the file. The package's own slice would be
            # empty there, and a count of 2^64 would loop for ever. It is also ten times as fast.
            return np.frombuffer(self.data, dtype, int(count), int(offset))

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == package.GGUFValueType.ARRAY:
                count = int(self._get(orig_offs + 4, np.uint64)[0])
                if count > _LONGEST_ARRAY:
                    raise ValueError(f"its metadata has an array of {count} elements")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is corrupt or truncated: {reason}. Download or copy it again.")
