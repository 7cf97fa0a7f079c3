"""What a request may hold.

Not covered: prompts that are longer than the reach (`generation.py`).
"""

from typing import Any

import mlx.nn as nn

from ..errors import InputError
from ..model.find_ropes import config_value

# Of numbers in a request; beyond them MLX fails while it samples.
BOUNDS: dict[str, float] = {
    "temperature": 100,
    "top_p": 1,
    "top_k": 1 << 31,
    "min_p": 1,
    "max_tokens": 1 << 31,
    "num_draft_tokens": 1000,
    "repetition_penalty": 1e6,
    "repetition_context_size": 1 << 31,
    "presence_penalty": 1e6,
    "presence_context_size": 1 << 31,
    "frequency_penalty": 1e6,
    "frequency_context_size": 1 << 31,
    "xtc_probability": 1,
    "xtc_threshold": 0.5,
    "seed": (1 << 63) - 1,
}
BODY_LIMIT = 64_000_000  # bytes of a request; a million tokens are about 5 MB of text


class RequestError(InputError):
    """A request that the model cannot answer."""

    code: str | None = None  # in OpenAI's words


class ContextTooLongError(RequestError):
    """A prompt that leaves no room within the model's reach."""

    code = "context_length_exceeded"


def check_tokens(model: nn.Module | None, args: Any) -> None:
    """Refuse what MLX does not check: the first would end the process, the second all sampling.

    Raises:
        RequestError: a token that does not exist, or more of them than there are.
    """
    vocabulary = None if model is None else config_value(model, "vocab_size")
    if vocabulary is None:
        return
    for token in args.logits.logit_bias or {}:
        if not 0 <= token < vocabulary:
            raise RequestError(f"logit_bias has token {token}; there are {vocabulary}.")
    if args.sampling.top_k >= vocabulary:
        raise RequestError(f"top_k must be below {vocabulary}, the number of tokens.")
