"""Conversations on disk: a prompt cache with the messages and tokens beside it.

A file may come from a stranger, so everything in it is checked before a conversation
takes it.

Not covered: forgery. A file whose numbers fit may hold another conversation than its
messages say.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.fingerprint import Fingerprint
from ..checkpoint.prompt_cache import is_ours, length_of, load_cache, save_cache, target_for
from ..errors import InputError
from ..model.scaled_model import scaled

_FORMAT = "2"
_ENTRY = "conversation"  # in the file's metadata
_ROLES = ("user", "assistant")  # in turns


def is_conversation(metadata: Mapping[str, str]) -> bool:
    """Return whether a cache file's metadata are those of a conversation."""
    return _ENTRY in metadata


def write_conversation(
    file: str | Path, caches: Sequence[Any], identity: Fingerprint, state: Mapping[str, Any]
) -> Path:
    """Write a conversation, whole or not at all, and return the file's path.

    Args:
        file: as the user gave it.
        caches: of the conversation.
        identity: the model's fingerprint.
        state: what `read_conversation` returns.

    Raises:
        InputError: as `target_for`.
        RunError: the file cannot be written.
    """
    path = target_for(file)
    entry = json.dumps({"format": _FORMAT, **state})
    save_cache(path, caches, identity, {_ENTRY: entry})
    return path


def read_conversation(
    file: str | Path, model: nn.Module, identity: Fingerprint
) -> tuple[list[Any], dict[str, Any]]:
    """Read a conversation that `write_conversation` wrote.

    Args:
        file: as the user gave it.
        model: that is to go on with it.
        identity: its fingerprint.

    Returns:
        (caches, state). The state has messages, tokens, cached, ended, open, asked and
        system_prompt, as `Conversation` keeps them.

    Raises:
        InputError: no such file, no conversation, a damaged one, or one of another model.
    """
    caches, metadata = load_cache(file, model, identity)
    try:
        state = json.loads(metadata[_ENTRY]) if is_ours(metadata) else {}
        version = state["format"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is no conversation that /save wrote.") from error
    if version != _FORMAT:
        raise InputError(
            f"{file} was saved by another version of mlx_clex. Read its documents again."
        )
    vocabulary = model(mx.array([[0]])).shape[-1]  # the shape alone: nothing is computed
    try:
        state.setdefault("asked", 0)  # older files lack it
        whole = _is_whole(state, vocabulary)
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole or length_of(caches) not in (None, state["cached"]):
        raise InputError(f"{file} is a damaged conversation. Restore another one.")
    scaled(model).check_length(len(state["tokens"]), f"The conversation in {file}")
    return caches, state


def _is_whole(state: Mapping[str, Any], vocabulary: int) -> bool:
    """Whether the state is one that a conversation can have."""
    messages, tokens, asked = state["messages"], state["tokens"], state["asked"]
    roles = [message["role"] for message in messages]
    texts = [message["content"] for message in messages] + [state["system_prompt"] or ""]
    for text in texts:
        text.encode()  # a lone surrogate cannot be shown
    return (
        all(type(state[key]) is bool for key in ("ended", "open"))
        and isinstance(state["system_prompt"], str | None)
        and all(set(message) == {"role", "content"} for message in messages)
        and roles == [_ROLES[i % 2] for i in range(len(messages))]
        and state["open"] == (roles[-1] == "user")
        and not (state["open"] and (state["ended"] or asked))
        and type(tokens) is list
        and all(type(token) is int and 0 <= token < vocabulary for token in tokens)
        and all(type(state[key]) is int for key in ("cached", "asked"))
        and 0 <= state["cached"] <= len(tokens)
        and 0 <= asked < len(tokens)
    )
