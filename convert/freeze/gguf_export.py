"""Write a frozen LLaMA as one .gguf file, for llama.cpp, Ollama and similar programs.

llama.cpp divides each base frequency by its factor in `rope_freqs.weight`, as it does for
Llama 3. A gain of the scores is multiplied into the query projections. The package `gguf` writes
the file, one tensor in memory at a time. mlx-lm's export has neither these factors nor byte-level
tokenizers.

Not covered: architectures other than `llama`; quantised blocks (llama.cpp's own tool makes them
from this file); byte-level tokenizers that are not in `_CUTS`; SentencePiece's collapsing of
spaces, which LLaMA does not use.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_clex.checkpoint.safetensors_file import info_of
from mlx_clex.errors import InputError, import_extra, reading

from ..write.output import finite_bytes

FILE = "model.gguf"
ROPE = "rope_freqs"  # the rope_scaling type of mlx_clex in the config of such a model

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a byte-level tokenizer.json cuts text -> llama.cpp's name for it.
# Source: ggml-org/llama.cpp, src/llama-vocab.cpp, `llm_tokenizer_bpe`.
_CUTS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA_3, "Bytes"): "llama-bpe",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # kinds of tokens


def check(config: Mapping[str, Any]) -> None:
    """Refuse a model that a .gguf file of the architecture `llama` cannot hold.

    Raises:
        InputError: another family, an unsupported feature, or no package `gguf`.
    """
    if config["model_type"] not in ("llama", "mistral"):
        raise InputError(
            f"--for llama.cpp writes llama and mistral models only; this one is "
            f"{config['model_type']}."
        )
    for key in ("sliding_window", "rope_traditional"):
        if config.get(key):
            raise InputError(f"--for llama.cpp: llama.cpp has no {key} {config[key]}.")
    if "quantization" in config:
        raise InputError("--for llama.cpp does not take MLX's quantised weights: add -d.")
    import_extra("gguf", "gguf", "--for llama.cpp")


def write(
    target: Path,
    config: dict[str, Any],
    tensors: dict[str, mx.array],
    tokenizer: Mapping[str, Any],
    *,
    name: str,
    advance: Callable[[int], object],
) -> None:
    """Write the .gguf file.

    Args:
        target: the new file.
        config: config from `frozen_config` for "llama.cpp".
        tensors: lazy arrays under Hugging Face names; emptied while writing.
        tokenizer: metadata from `tokenizer_of`.
        name: name of the model, shown to users.
        advance: called after each tensor with its size in bytes.

    Raises:
        InputError: the file cannot hold a setting, or a tensor has values that are not finite.
    """
    gguf = import_extra("gguf", "gguf", "--for llama.cpp")
    entry = config["rope_scaling"]
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    types = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])

    arrays = {"rope_freqs.weight": mx.array(entry["factors"], mx.float32)}
    for theirs, array in list(tensors.items()):
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise InputError(f"--for llama.cpp: llama.cpp has no tensor for {theirs}.")
        if ".attn_q." in ours:
            array = permute(array * entry["query_gain"], heads)
        elif ".attn_k." in ours:
            array = permute(array, key_heads)
        # llama.cpp adds and multiplies vectors in float32 only.
        arrays[ours] = array.astype(mx.float32) if array.ndim == 1 else array
        del tensors[theirs]

    kind = types[arrays["token_embd.weight"].dtype]
    writer = gguf.GGUFWriter(target, "llama")
    with closing(writer):
        with reading("--for llama.cpp cannot write the settings of this model"):
            writer.add_name(name)
            writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[kind])
            writer.add_context_length(config["max_position_embeddings"])
            writer.add_embedding_length(config["hidden_size"])
            writer.add_block_count(config["num_hidden_layers"])
            writer.add_feed_forward_length(config["intermediate_size"])
            writer.add_head_count(heads)
            writer.add_head_count_kv(key_heads)
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
            writer.add_rope_dimension_count(config["head_dim"])
            writer.add_rope_freq_base(config["rope_theta"])
            writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
            writer.add_vocab_size(arrays["token_embd.weight"].shape[0])
            for key, value in tokenizer.items():
                _put(writer, key, value)
            for ours, array in arrays.items():
                raw = gguf.GGMLQuantizationType[types[array.dtype]]
                writer.add_tensor_info(ours, array.shape, np.dtype(np.float32), array.nbytes, raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for ours in list(arrays):
            size = info_of(arrays[ours]).nbytes
            writer.write_tensor_data(np.frombuffer(finite_bytes(ours, arrays.pop(ours)), np.uint8))
            mx.clear_cache()
            advance(size)


def permute(rows: mx.array, heads: int) -> mx.array:
    """Return the rows in llama.cpp's order: halves of a head become neighbouring pairs.

    Args:
        rows: the weight or bias of a query or key projection, (H * head_dim, ...).
        heads: H.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tokenizer_of(folder: Path, rows: int) -> dict[str, Any]:
    """Return the GGUF metadata of a tokenizer.

    Args:
        folder: a folder with tokenizer.json, tokenizer_config.json and perhaps tokenizer.model.
        rows: rows of the embedding; the file gets as many tokens.

    Raises:
        InputError: llama.cpp has no such tokenizer, or mlx_clex does not know its name there.
        Exception: the files are damaged.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError("--for llama.cpp needs a tokenizer.json, which the source lacks.")
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if (folder / "tokenizer.model").exists():
        found = _sentencepiece(folder / "tokenizer.model")
    else:
        found = _byte_level(whole, rows)
    tokens, kinds = found["tokens"], found["token_type"]
    ids = {token["content"]: token["id"] for token in whole["added_tokens"]}
    special = {token["id"] for token in whole["added_tokens"] if token["special"]}
    for number in range(len(tokens), rows):
        tokens.append(f"[PAD{number}]")
        kinds.append(_UNUSED)
    for token, number in ids.items():
        if number < rows:
            tokens[number] = token
            if kinds[number] != _UNKNOWN:
                kinds[number] = _CONTROL if number in special else _USER_DEFINED
    if "scores" in found:
        found["scores"] += [-1000.0] * (rows - len(found["scores"]))
    ids |= {token: number for number, token in enumerate(tokens)}
    ends = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for theirs, ours in ends.items():
        token = config.get(f"{theirs}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            found[f"{ours}_token_id"] = ids[token]
    first = _encode(folder, "a")[:1]
    found["add_bos_token"] = bool(first) and first[0] == found.get("bos_token_id")
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = folder / "chat_template.jinja"
    text = config.get("chat_template")
    if text is None and template.exists():
        text = template.read_text(encoding="utf-8")
    if isinstance(text, str):
        metadata["tokenizer.chat_template"] = text
    return metadata


def _sentencepiece(file: Path) -> dict[str, Any]:
    proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(file.read_bytes())
    return {
        "model": "llama",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        # GGUF numbers the kinds as SentencePiece does.
        "token_type": [piece.type for piece in proto.pieces],
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
    }


def _byte_level(whole: dict[str, Any], rows: int) -> dict[str, Any]:
    model = whole["model"]
    cut = tuple(_cuts(whole.get("pre_tokenizer") or {}))
    if model.get("type") != "BPE" or whole.get("normalizer") or cut not in _CUTS:
        raise InputError(
            "--for llama.cpp: mlx_clex does not know llama.cpp's name for this tokenizer. It knows "
            f"SentencePiece's tokenizer.model, and the byte-level {', '.join(_CUTS.values())}."
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = {number: token for token, number in model["vocab"].items()}  # may leave ids out
    return {
        "model": "gpt2",
        "pre": _CUTS[cut],
        "tokens": [tokens.get(number, f"[PAD{number}]") for number in range(rows)],
        "token_type": [_NORMAL if number in tokens else _UNUSED for number in range(rows)],
        "merges": merges,
    }


def _cuts(step: Mapping[str, Any]) -> list[str]:
    """Return the steps of a pre_tokenizer, each as a word or a regular expression."""
    kind = step.get("type")
    if kind == "Sequence":
        return [cut for inner in step["pretokenizers"] for cut in _cuts(inner)]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [str(step["pattern"].get("Regex"))]
    if kind == "Digits" and step.get("individual_digits"):
        return ["Digits"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ["ByteLevel" if step.get("use_regex", True) else "Bytes"]
    return [str(step)]


def _encode(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


def _put(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
