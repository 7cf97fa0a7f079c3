"""Loss and perplexity of a model as inference runs it.

Each sequence is read in one pass, at the scale and gain of its whole length (the protocol
called *whole*), and the loss is taken in chunks, so that long sequences fit.

Not covered: reading in chunks with a cache, and sliding windows.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..attach import ScaledModel, check_length
from ..errors import InputError
from .data import Corpus
from .loss import chunk_length, summed_loss
from .step import Batch


def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean loss of the tokens that count, nats; NaN where there is none."""
    chunk = chunk_length(getattr(model.args, "vocab_size", 32_000))
    total = counted = 0.0
    with _evaluating(model):
        for batch in batches:
            tokens, targets, weights = (mx.array(a) for a in batch)
            total += float(summed_loss(model, tokens, targets, weights, chunk))
            counted += float(batch.weights.sum())
    return total / counted if counted else math.nan


def perplexity(model: nn.Module, corpus: Corpus, length: int, windows: int) -> float:
    """Perplexity of sequences of one length.

    Args:
        model: from `load` or `attach`.
        corpus: its texts end to end; the windows are spread evenly over them.
        length: tokens read in one pass.
        windows: how many sequences at most; fewer where they would overlap.

    Raises:
        InputError: the corpus is shorter than one sequence, or the model's reach is.
    """
    check_lengths(model, corpus, [length])
    possible = (len(corpus.tokens) - 1) // length
    count = min(windows, possible)
    starts = np.linspace(0, len(corpus.tokens) - 1 - length, count).astype(int)
    loss = mean_loss(model, (_window(corpus, start, length) for start in starts))
    return math.exp(min(loss, 700))  # e^700: the largest there is as a float


def check_lengths(model: nn.Module, corpus: Corpus, lengths: Iterable[int]) -> None:
    """Refuse lengths that `perplexity` cannot be asked for.

    Raises:
        InputError: the message has the length and what there is.
    """
    for length in lengths:
        if length < 2:
            raise InputError(f"A length to evaluate at must be at least 2 tokens, got {length}.")
        if isinstance(model, ScaledModel):
            check_length(model, length)
        if len(corpus.tokens) <= length:
            raise InputError(
                f"{corpus.name} has {len(corpus.tokens)} tokens, too few for a sequence of "
                f"{length} + 1: give more text or a smaller length."
            )


def _window(corpus: Corpus, start: int, length: int) -> Batch:
    ids = np.asarray(corpus.tokens[start : start + length + 1], np.int32)[None]
    return Batch(ids[:, :-1], ids[:, 1:], np.ones((1, length), np.float32))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and with the frequencies that inference has."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
