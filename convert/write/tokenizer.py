"""Write the tokenizer files of the converted folder.

A SentencePiece model becomes a tokenizer.json that gives BOS and then SentencePiece's ids. Other
tokenizers are copied. `model_max_length` is the model's reach.

Not covered: tokenizers that need Python from the checkpoint, which is never run.
"""

import json
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_clex.checkpoint.folder import TEMPLATES, files_of
from mlx_clex.checkpoint.released_templates import template_for
from mlx_clex.errors import InputError, reading

from ..read import gguf_tokenizer
from ..read.gguf_file import GgufFile
from ..read.source import TOKENIZER_FILES, Checkpoint, read_json
from .output import write_json
from .spaces import treat_spaces

_CONFIG = "tokenizer_config.json"
# The tokens of Llama. A checkpoint with only a tokenizer.model does not name them.
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_tokenizer(
    checkpoint: Checkpoint, folder: Path, reach: int, gguf: GgufFile | None = None
) -> str | None:
    """Write the tokenizer of a checkpoint into the converted folder.

    Args:
        checkpoint: the source.
        folder: the folder to write to.
        reach: longest sequence in tokens, written as `model_max_length`.
        gguf: the parsed .gguf file, if that is the source.

    Returns:
        A line for the user if the tokenizer is missing, else None.

    Raises:
        InputError: the tokenizer files are broken.
    """
    with reading(f"The tokenizer of {checkpoint.folder} does not load"):
        config = gguf_tokenizer.write(gguf, folder) if gguf else _copy(checkpoint.folder, folder)
    if config is None:
        return (
            f"{checkpoint.folder} has no tokenizer (tokenizer.json or tokenizer.model): "
            "the converted folder has none either."
        )
    config["model_max_length"] = reach
    own = config.get("chat_template") or any(
        (folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")
    )
    template = template_for(checkpoint.repo or checkpoint.folder.resolve().name)
    if template is not None and not own:
        config["chat_template"] = template
    write_json(folder / _CONFIG, config)
    return None


def _copy(source: Path, folder: Path) -> dict[str, Any] | None:
    """Copy or rebuild the files; return the content of tokenizer_config.json."""
    inside = files_of(source)
    files = [file for pattern in TOKENIZER_FILES for file in inside if file.match(pattern)]
    names = {file.name for file in files}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"} and not any(
        name.endswith(".tiktoken") for name in names
    ):
        return None
    config = read_json(source / _CONFIG) if _CONFIG in names else {}
    if not isinstance(config, dict):
        raise InputError(f"{source / _CONFIG} is not a JSON object.")
    config.pop("auto_map", None)  # names code that is never run
    for file in files:
        shutil.copyfile(file, folder / file.name)
    for file in sorted((source / TEMPLATES).glob("*.jinja")):  # checked by files_of
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / TEMPLATES / file.name)
    kind = str(config.get("tokenizer_class") or "")
    llama = kind.startswith(("LlamaTokenizer", "CodeLlamaTokenizer"))
    if "tokenizer.model" in names and (llama or "tokenizer.json" not in names):
        return _from_sentencepiece(source, folder, config)
    return config


def _from_sentencepiece(source: Path, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write tokenizer.json from tokenizer.model and added tokens; return the config.

    From a tokenizer.model alone, transformers 5 adds no BOS and no space before the first word,
    and does not apply SentencePiece's normalisation.
    """
    from tokenizers import Tokenizer
    from transformers import LlamaTokenizer

    proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    with reading(f"{source / 'tokenizer.model'} is no SentencePiece model"):
        proto.ParseFromString((source / "tokenizer.model").read_bytes())
        if not proto.pieces:
            raise ValueError("it has no pieces")
    beside = folder / "tokenizer.json"  # of the same tokens: what was added to them later
    given = Tokenizer.from_file(str(beside)) if beside.exists() else None
    if given is not None:
        config.setdefault("legacy", getattr(given.pre_tokenizer, "prepend_scheme", "") != "first")
    config = _LLAMA_TOKENS | {"tokenizer_class": "LlamaTokenizer"} | config
    config.setdefault("add_bos_token", True)
    config.setdefault("add_eos_token", False)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tokenizer.model", "special_tokens_map.json", "added_tokens.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, Path(scratch, name))
        Path(scratch, _CONFIG).write_text(json.dumps(config), encoding="utf-8")
        tokenizer = LlamaTokenizer.from_pretrained(scratch)
    backend = tokenizer.backend_tokenizer
    spec = proto.normalizer_spec
    treat_spaces(
        backend,
        prefix=spec.add_dummy_prefix,
        collapse=spec.remove_extra_whitespaces,
        charsmap=spec.precompiled_charsmap,
        legacy=config.get("legacy", True),
    )
    added = given.get_added_tokens_decoder() if given is not None else {}
    for index, token in sorted(added.items()):
        if backend.token_to_id(token.content) is None:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            if backend.token_to_id(token.content) != index:
                raise InputError(
                    f"{source / 'tokenizer.json'} gives its added token {token.content!r} the id "
                    f"{index}, which does not follow the others."
                )
    backend.save(str(folder / "tokenizer.json"))
    # The Llama class would replace everything but the vocabulary.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config
