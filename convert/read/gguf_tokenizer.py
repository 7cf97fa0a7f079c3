"""Write the tokenizer of a .gguf file.

transformers builds the tokenizer from the metadata. The metadata is read by `gguf_file.py`, so
torch is not needed.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_clex.errors import InputError, reading, shown

from ..write.spaces import treat_spaces
from .gguf_file import GgufFile

_KEYS = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write(gguf: GgufFile, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json, and return the content of tokenizer_config.json.

    Args:
        gguf: the parsed file.
        folder: the folder to write to.

    Raises:
        InputError: transformers cannot build this kind of tokenizer.
    """
    metadata = gguf.metadata
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise InputError(f"{gguf.path} has no tokenizer in its metadata.")
    given = {
        ours: metadata[f"tokenizer.ggml.{theirs}"]
        for theirs, ours in _KEYS.items()
        if f"tokenizer.ggml.{theirs}" in metadata
    }
    with reading(f"{gguf.path}: cannot build a tokenizer of kind {shown(kind)}"):
        backend, _ = _converter()(metadata["general.architecture"], given)
    if kind == "llama":
        treat_spaces(
            backend,
            prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
            collapse=metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in _SPECIAL.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is not None and 0 <= index < len(tokens):
            config[name] = tokens[index]
    _add_ends(backend, config)
    backend.save(str(folder / "tokenizer.json"))
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def _add_ends(backend: Any, config: dict[str, Any]) -> None:
    """Add BOS before and EOS after a text, if the config asks for them."""
    from tokenizers import processors

    before = [config["bos_token"]] if config["add_bos_token"] and "bos_token" in config else []
    after = [config["eos_token"]] if config["add_eos_token"] and "eos_token" in config else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, backend.token_to_id(token)) for token in (*before, *after)],
        )


def _converter() -> Any:
    try:
        module = import_module("transformers.integrations.gguf")
    except ImportError:  # its name in earlier versions of transformers 5
        module = import_module("transformers.integrations.ggml")
    return module.convert_gguf_tokenizer
