"""How far two models differ at each token of a text."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..model.head import chunk_length
from .perplexity import log_sum_exp, logits_of_text


def differences(
    a: nn.Module,
    b: nn.Module,
    ids: np.ndarray,
    on_read: Callable[[int], Any] = lambda tokens: None,
) -> np.ndarray:
    """What lies between two models at each token of a text but the first.

    Args:
        a: the model that is held against.
        b: the other one.
        ids: the text, (L,).
        on_read: is told how many more tokens both have read.

    Returns:
        For every token, float64, (L - 1, 4): the divergence KL(A || B) of what the models
        expect there, nats; 1 where their first choices differ, else 0; and the loss of the
        token in A and in B, nats.

    Raises:
        InputError: they are not over the same vocabulary, or the text is beyond a reach.
    """
    chunk = min(chunk_length(getattr(model.args, "vocab_size", 32_000)) for model in (a, b))
    found = []
    both = zip(
        logits_of_text(a, ids[None], head_chunk=chunk),
        logits_of_text(b, ids[None], head_chunk=chunk, on_read=on_read),
        strict=True,
    )
    for (start, of_a), (_, of_b) in both:
        if of_a.shape != of_b.shape:
            raise InputError(
                f"A answers over {of_a.shape[-1]} tokens and B over {of_b.shape[-1]}: there is no "
                "divergence between them."
            )
        following = ids[None, start + 1 : start + 1 + of_a.shape[1], None]
        targets = mx.array(following.astype(np.int32))
        log_a, log_b = (x - log_sum_exp(x)[..., None] for x in (of_a, of_b))
        columns = [
            (mx.exp(log_a) * (log_a - log_b)).sum(axis=-1),
            of_a.argmax(axis=-1) != of_b.argmax(axis=-1),
            *(-mx.take_along_axis(x, targets, axis=-1)[..., 0] for x in (log_a, log_b)),
        ]
        found.append(np.array(mx.stack([x[0].astype(mx.float32) for x in columns], axis=-1)))
    return np.concatenate(found).astype(np.float64)
