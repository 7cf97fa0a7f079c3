"""Opens the tokenizer of a folder, and checks that its ids are the model's."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..errors import InputError, reading, say, shown
from .config import read_by_transformers
from .rendering import guard

_LARGEST_GROWTH = 1000  # of a text by a normalizer; those of published models replace by one letter


def open_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> Any:
    """Load a folder's tokenizer as mlx-lm wraps it.

    Args:
        folder: of a checkpoint, with its config.json.
        config: the content of config.json; read are `eos_token_id` and `vocab_size`.
        options: those of the tokenizer.
        name: what messages call the folder; None: its path.

    Raises:
        InputError: it does not load, has tokens beyond the model's vocabulary, or the end token
            of the options is none of its tokens.
    """
    name = name or str(folder)
    vocabulary = config.get("vocab_size")
    ends = _ends(config.get("eos_token_id"), vocabulary)
    # It warns of our rope_scaling types, and of what is refused or ignored here with a line.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options = dict(options or {})
    given = options.pop("eos_token", None)  # transformers adds a token that is not there
    with reading(f"{name} has no tokenizer that loads"):
        if config.get("model_type") not in CONFIG_MAPPING:
            # transformers reads nothing but the rope of a family that it does not know.
            options.setdefault("config", PreTrainedConfig())
        elif (read := read_by_transformers(config)) is not None:
            options.setdefault("config", read)  # else transformers says what is wrong
        tokenizer = load_tokenizer(folder, options, eos_token_ids=ends)
        highest = max(_ids_of(tokenizer), default=-1)
        if highest < 0:
            raise ValueError("its vocabulary is empty")
        templates = getattr(tokenizer._tokenizer, "chat_template", None) or ""
        for text in templates.values() if isinstance(templates, dict) else [templates]:
            if not isinstance(text, str):
                raise ValueError(f"its chat_template is {shown(text)}, not a text")
        backend = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
        normalizer = getattr(backend, "normalizer", None)
        longer = 1 if normalizer is None else _growth(json.loads(normalizer.__getstate__()))
        if longer > _LARGEST_GROWTH:
            raise ValueError(f"its normalizer can make a text {longer:,} times as long")
        # Some broken files fail, or panic, only when a text is encoded or decoded.
        ids = tokenizer.encode("A text.")
        tokenizer.decode(ids)
    guard(tokenizer)
    if isinstance(vocabulary, int) and highest >= vocabulary:
        raise InputError(
            f"{name} has a tokenizer with ids up to {highest}, but its model's vocab_size is "
            f"{vocabulary}: it is another model's tokenizer."
        )
    if given is not None:
        end = end_token(tokenizer, str(given), vocabulary)
        tokenizer._tokenizer.eos_token = str(given)
        tokenizer.eos_token_ids = [*(ends or []), end]
    return tokenizer


def end_token(tokenizer: Any, text: str, vocabulary: int | None) -> int:
    """Return the id of a token that is to end texts.

    Args:
        tokenizer: mlx-lm's wrapper.
        text: the token, as the tokenizer's vocabulary writes it.
        vocabulary: vocab_size of the model, or None.

    Raises:
        InputError: the tokenizer has no such token, or the model does not.
    """
    found = tokenizer.get_vocab().get(text)
    if found is None or not 0 <= found < (vocabulary or math.inf):
        below = "" if vocabulary is None else f", with an id below vocab_size ({vocabulary})"
        raise InputError(
            f"The end token {text!r} is no token of this model. An end token must be one token of "
            f"its tokenizer{below}. Give another to --extra-eos-token, or to cache_prompt "
            "--eos-token."
        )
    return int(found)


def _growth(normalizer: Mapping[str, Any]) -> int:
    """Return how many times as long a normalizer of tokenizer.json can make a text."""
    parts = normalizer.get("normalizers")
    if parts is not None:
        return math.prod(_growth(part) for part in parts)
    return max(1, len(normalizer.get("content") or normalizer.get("prepend") or ""))


def _ends(given: Any, vocabulary: Any) -> list[int] | None:
    """Return the ids that end a text; None: the tokenizer's own."""
    ends = given if isinstance(given, list) else [given]
    for end in ends:
        if end is not None and (not isinstance(end, int) or isinstance(end, bool) or end < 0):
            raise InputError(
                f"config.json or generation_config.json has eos_token_id {shown(given)}; it must "
                "be an id, or a list of them."
            )
    beyond: list[int] = []
    if isinstance(vocabulary, int):
        beyond = [end for end in ends if end is not None and end >= vocabulary]
    if beyond:
        say(
            f"eos_token_id {beyond[0]} is beyond vocab_size ({vocabulary}), so no text ends with "
            "it. It is ignored."
        )
    return [end for end in ends if end is not None and end not in beyond] or None


def _ids_of(tokenizer: Any) -> set[int]:
    """Ids that ordinary text can become.

    Added tokens are left out: many published models have a padding token beyond their
    vocabulary, which no text contains.
    """
    return set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
