"""llama-family .gguf files, rewritten as safetensors.

Reads the header itself and the data one tensor at a time: `mx.load` would take the whole
file into memory at once, and has no answer but a crash for a broken one. Weights come out
as float16 (or as stored, where they are floats), under Hugging Face names and in Hugging
Face's order of rows. Not covered: other architectures than `llama`, experts, and the
tokenizer (`gguf_tokenizer.py`).
"""

import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_clex.checkpoint.safetensors_file import TensorInfo, write
from mlx_clex.errors import InputError

from .gguf_blocks import BLOCKS, decode

# GGUF name -> Hugging Face name, of the llama architecture.
TABLE: dict[str, str] = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": "model.layers.{}.input_layernorm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": "model.layers.{}.post_attention_layernorm.weight",
    r"blk\.(\d+)\.attn_q\.weight": "model.layers.{}.self_attn.q_proj.weight",
    r"blk\.(\d+)\.attn_k\.weight": "model.layers.{}.self_attn.k_proj.weight",
    r"blk\.(\d+)\.attn_v\.weight": "model.layers.{}.self_attn.v_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": "model.layers.{}.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_gate\.weight": "model.layers.{}.mlp.gate_proj.weight",
    r"blk\.(\d+)\.ffn_up\.weight": "model.layers.{}.mlp.up_proj.weight",
    r"blk\.(\d+)\.ffn_down\.weight": "model.layers.{}.mlp.down_proj.weight",
}
_DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "BF16"}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # bytes; GGUF's default


class Tensor(NamedTuple):
    """One tensor as the file stores it."""

    name: str
    shape: tuple[int, ...]  # rows first, as numpy has it
    kind: int  # ggml type
    start: int  # bytes from the start of the file
    nbytes: int


class GgufFile(NamedTuple):
    """A parsed header."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[Tensor]


def read(path: Path) -> GgufFile:
    """Parse the header of a .gguf file.

    Raises:
        InputError: the file is no GGUF, cut off, or of a type that is not served.
    """
    with path.open("rb") as file:
        try:
            blob: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise _broken(path, "it is empty") from error
    with blob:
        try:
            return _parse(path, blob)
        except InputError:
            raise
        except Exception as error:
            raise _broken(path, "its header is not readable") from error


def config_of(gguf: GgufFile) -> dict[str, Any]:
    """A config.json for the file.

    Raises:
        InputError: another architecture, a feature of it that is not served, or metadata
            of impossible types.
    """
    try:
        return _config_of(gguf)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _broken(gguf.path, f"its metadata makes no sense ({error})") from error


def _config_of(gguf: GgufFile) -> dict[str, Any]:
    metadata = gguf.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"{gguf.path} has the architecture {architecture!r}; .gguf files are read for "
            "llama only. Use the model's safetensors."
        )

    def key(name: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{name}", default)
        if value is None:
            raise InputError(f"{gguf.path} has no llama.{name} in its metadata.")
        return value

    names = {tensor.name for tensor in gguf.tensors}
    if key("expert_count", 0):
        raise InputError(f"{gguf.path} is a mixture of experts; use its safetensors.")
    if "rope_freqs.weight" in names:
        raise InputError(
            f"{gguf.path} brings rotary frequencies of its own (rope_freqs.weight), to which "
            "no other scaling can be added; use a model without them."
        )
    heads, width = key("attention.head_count"), key("embedding_length")
    head_dim = key("attention.key_length", width // heads)
    if key("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{gguf.path} rotates only part of a head; use its safetensors.")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
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
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
    }
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        config["rope_scaling"] = {"type": kind, "factor": key("rope.scaling.factor")}
        original = metadata.get("llama.rope.scaling.original_context_length")
        config["max_position_embeddings"] = original or config["max_position_embeddings"]
    elif kind != "none":
        raise InputError(f"{gguf.path} has rope scaling {kind!r}; linear and yarn are read.")
    return config


def header(gguf: GgufFile) -> dict[str, TensorInfo]:
    """Names and shapes as `spool` will write them.

    Raises:
        InputError: a tensor that the llama architecture does not have.
    """
    return {_rename(gguf, tensor): _info(tensor) for tensor in gguf.tensors}


def spool(gguf: GgufFile, target: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Rewrite the tensors as safetensors, one in memory at a time.

    Args:
        gguf: the parsed file.
        target: the new file.
        advance: told the number of bytes after each tensor.
    """
    heads = gguf.metadata["llama.attention.head_count"]
    key_heads = gguf.metadata.get("llama.attention.head_count_kv", heads)

    def data(tensor: Tensor) -> Callable[[], memoryview]:
        def read_tensor() -> memoryview:
            raw = np.fromfile(gguf.path, np.uint8, tensor.nbytes, offset=tensor.start)
            array = decode(raw, tensor.kind, tensor.shape)
            if ".attn_q." in tensor.name:
                array = unpermute(array, heads)
            elif ".attn_k." in tensor.name:
                array = unpermute(array, key_heads)
            return np.ascontiguousarray(array).data.cast("B")

        return read_tensor

    entries = [(_rename(gguf, t), _info(t), data(t)) for t in gguf.tensors]
    write(target, entries, "pt", advance)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows: pairs beside each other become two halves.

    Args:
        rows: the weight of a query or key projection, (H * head_dim, width).
        heads: H.

    Returns:
        The same rows in Hugging Face's order.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _rename(gguf: GgufFile, tensor: Tensor) -> str:
    for pattern, name in TABLE.items():
        match = re.fullmatch(pattern, tensor.name)
        if match:
            return name.format(*match.groups())
    raise InputError(f"{gguf.path} has the tensor {tensor.name}, which llama does not have.")


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(_DTYPES[BLOCKS[tensor.kind].dtype], tensor.shape)


def _parse(path: Path, blob: Any) -> GgufFile:
    if blob[:4] != b"GGUF":
        raise _broken(path, "it does not start with GGUF")
    version, count, pairs = struct.unpack_from("<IQQ", blob, 4)
    if version not in (2, 3):
        raise InputError(f"{path} is GGUF version {version}; versions 2 and 3 are read.")
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key, at = _string(blob, at)
        (kind,) = struct.unpack_from("<I", blob, at)
        metadata[key], at = _value(path, blob, at + 4, kind)
    table = []
    for _ in range(count):
        name, at = _string(blob, at)
        (ranks,) = struct.unpack_from("<I", blob, at)
        shape = struct.unpack_from(f"<{ranks}Q", blob, at + 4)[::-1]
        kind, offset = struct.unpack_from("<IQ", blob, at + 4 + 8 * ranks)
        at += 16 + 8 * ranks
        table.append((name, shape, kind, offset))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise InputError(f"{path}: general.alignment is {alignment!r}; the file is damaged.")
    data = -(-at // alignment) * alignment
    return GgufFile(path, metadata, [_tensor(path, len(blob), data, *row) for row in table])


def _tensor(
    path: Path, size: int, data: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Tensor:
    if kind not in BLOCKS:
        raise InputError(
            f"{path}: tensor {name} has ggml type {kind}, which is not read. Read are "
            f"{', '.join(block.name for block in BLOCKS.values())}: take a file of one of "
            "those, or the model's safetensors."
        )
    block = BLOCKS[kind]
    elements = int(np.prod(shape, dtype=object)) if shape else 1
    if not shape or shape[-1] % block.elements:
        raise _broken(path, f"the shape {shape} of {name} does not fit its type")
    nbytes = elements // block.elements * block.nbytes
    if data + offset + nbytes > size:
        raise _broken(path, f"the data of {name} is past its end")
    return Tensor(name, shape, kind, data + offset, nbytes)


def _value(path: Path, blob: Any, at: int, kind: int) -> tuple[Any, int]:
    if kind in _NUMBERS:
        code = "<" + _NUMBERS[kind]
        return struct.unpack_from(code, blob, at)[0], at + struct.calcsize(code)
    if kind == _STRING:
        return _string(blob, at)
    if kind != _ARRAY:
        raise _broken(path, f"its metadata has a value of type {kind}")
    inner, count = struct.unpack_from("<IQ", blob, at)
    at += 12
    if inner in _NUMBERS:
        code = f"<{count}{_NUMBERS[inner]}"
        return list(struct.unpack_from(code, blob, at)), at + struct.calcsize(code)
    values = []
    for _ in range(count):
        value, at = _value(path, blob, at, inner)
        values.append(value)
    return values, at


def _string(blob: Any, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", blob, at)
    text = blob[at + 8 : at + 8 + length]
    if len(text) != length:
        raise IndexError("past the end")
    return text.decode("utf-8", errors="replace"), at + 8 + length


def _broken(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is corrupt or cut off: {reason}. Download it again, or copy it again."
    )
