"""Compare the predictions of two models at each token of a text."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..model.chunked_loss import chunk_for
from .perplexity import log_sum_exp, logits_of_text


def differences(
    a: nn.Module,
    b: nn.Module,
    ids: np.ndarray,
    on_read: Callable[[int], Any] = lambda tokens: None,
) -> np.ndarray:
    """Return how the predictions of two models differ at each token after the first.

    Args:
        a: the reference model, A.
        b: the model to compare with it, B.
        ids: token ids, (L,).
        on_read: called with the number of tokens that both models have read since the last call.

    Returns:
        float64, (L - 1, 4). The columns are: KL(A || B) of the next-token distributions, nats;
        1 where the most likely tokens differ, else 0; the loss of the token in A, nats; its
        loss in B, nats.

    Raises:
        InputError: the vocabularies differ, or the text is longer than a model's reach.
    """
    chunk = min(chunk_for(model) for model in (a, b))
    found = []
    both = zip(
        logits_of_text(a, ids[None], head_chunk=chunk),
        logits_of_text(b, ids[None], head_chunk=chunk, on_read=on_read),
        strict=True,
    )
    for (start, of_a), (_, of_b) in both:
        if of_a.shape != of_b.shape:
            raise InputError(
                f"A has a vocabulary of {of_a.shape[-1]} tokens and B one of {of_b.shape[-1]}. "
                "Compare models with the same vocabulary."
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
