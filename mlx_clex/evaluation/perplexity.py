"""Measure loss and perplexity the way inference reads a prompt.

The model reads a text in steps through a cache that is planned for its length, so every
token uses the scale and gain of the whole text, or of its chunk. The output head runs on a
few tokens at a time. Memory therefore never holds all logits or all attention scores.

Not covered: the loss of training, which `mean_loss` computes with one pass for each batch.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache

from ..data.batch import Batch
from ..data.corpus import Corpus
from ..errors import InputError, generating
from ..model.chunked_loss import chunk_for, hidden_states, logits_of, summed_loss
from ..model.plans import planned_caches
from ..model.scaled_model import make_prompt_cache, scaled
from .intervals import exp, half_interval

_STEP = 512  # tokens in one pass, over all rows; attention scores are (H, _STEP, L)
_BLOCK = 256  # vocabulary entries in one partial sum of `log_sum_exp`


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How windows of a text are read, and which of their tokens count.

    *whole* (neither field): a window is read at the scale of its length. All its tokens count
    except the first, which has no context.

    *chunked* (`chunk`): a window is read in chunks, each at the scale of the length reached at
    the end of the chunk. The first token of each chunk does not count. CLEX's published
    figures use this protocol, with the trained length as the chunk.

    *sliding* (`stride`): windows overlap and begin `stride` tokens apart. Each is read and
    counted as in *whole*. GeNE's published figures use this protocol, with a stride of 1,024.

    *same targets* (`targets`): windows of every length end at the same places. Only their last
    `targets` tokens count, without the first of these, which has no context in a window of
    that length. Lengths differ only in the context that the same tokens have. In *whole*
    windows early tokens have little context, which raises the perplexity of short lengths and
    hides what late tokens lose.
    """

    chunk: int | None = None  # tokens
    stride: int | None = None  # tokens between the starts of neighbouring windows
    targets: int | None = None  # tokens at the end of each window; the trained length

    def __post_init__(self) -> None:
        for name, value, least in (("chunk", self.chunk, 2), ("stride", self.stride, 1)):
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least} tokens, got {value}.")

    def counts(self, length: int) -> np.ndarray:
        """Return which tokens of a window count, from the second on, bool, (length - 1,)."""
        positions = np.arange(1, length)
        if self.targets is not None:
            return positions > length - self.targets
        return positions % (self.chunk or length) != 0

    def starts(
        self, corpus: Corpus, length: int, windows: int, longest: int | None = None
    ) -> list[int]:
        """Return the starts of at most `windows` windows; see `windows_of`."""
        if self.targets is None:
            return windows_of(corpus, length, windows, self.stride, longest)
        longest = longest or length
        return [start + longest - length for start in windows_of(corpus, longest, windows)]


WHOLE = Protocol()


@dataclass(frozen=True)
class Score:
    """Losses of W windows of one length."""

    losses: np.ndarray  # mean of each window, nats, (W,)
    tokens: int  # counted tokens of all windows; every window has the same number

    @property
    def loss(self) -> float:
        """Return the mean over all counted tokens, nats."""
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return exp(self.loss)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of the perplexity; None below five windows.

        The interval is Student's t for the mean loss of a window, exponentiated, and at least 1.
        Overlapping windows are not independent, so their interval is too narrow.
        """
        margin = half_interval(self.losses)
        if margin is None:
            return None
        return max(1.0, exp(self.loss - margin)), exp(self.loss + margin)


def score(
    model: nn.Module,
    corpus: Corpus,
    length: int,
    windows: int,
    protocol: Protocol = WHOLE,
    longest: int | None = None,
    **reading: Any,
) -> Score:
    """Return the losses of windows of one length.

    Args:
        model: from `load` or `attach`, or any model of mlx-lm.
        corpus: the texts; `windows_of` places the windows.
        length: length of a window, tokens.
        windows: largest number of windows.
        protocol: how the windows are read, and which of their tokens count.
        longest: the largest length of the comparison, tokens; see `windows_of`.
        reading: kv_bits, kv_group_size and on_read of `logits_of_text`.

    Raises:
        InputError: the length is larger than the texts, or than the model's reach.
    """
    check_lengths(model, corpus, [length])
    if protocol.targets is not None:
        check_targets(corpus, [length], protocol.targets)
    starts = protocol.starts(corpus, length, windows, longest)
    counts = protocol.counts(length)
    skip = int(counts.argmax())
    losses: list[float] = []
    rows = max(1, _STEP // length)
    for batch in (starts[at : at + rows] for at in range(0, len(starts), rows)):
        ids = np.stack([corpus.tokens[start : start + length] for start in batch])
        of_rows = losses_of_text(model, ids, protocol.chunk, skip=skip, **reading)
        losses += of_rows[:, counts[skip:]].mean(axis=1, dtype=np.float64).tolist()
    return Score(np.array(losses), len(losses) * int(counts.sum()))


def windows_of(
    corpus: Corpus,
    length: int,
    count: int,
    stride: int | None = None,
    longest: int | None = None,
) -> list[int]:
    """Return the starts of windows, spread evenly over all possible places.

    A window lies within one text, at a multiple of `stride` (None: of `length`). Texts shorter
    than `longest` (None: than `length`) are skipped, so that all lengths of a comparison read
    the same texts. If no text is long enough, all texts are joined end to end.
    """
    starts, sizes = corpus.starts, corpus.ends - corpus.starts
    enough = sizes >= max(longest or 0, length)
    starts, sizes = starts[enough], sizes[enough]
    if not len(starts):
        starts, sizes = np.array([0]), np.array([len(corpus.tokens)])
    step = stride or length
    places = (sizes - length) // step + 1  # in each text
    ends = np.cumsum(places)
    chosen = np.linspace(0, ends[-1] - 1, min(count, ends[-1])).round().astype(int)
    texts = np.searchsorted(ends, chosen, side="right")
    nth = chosen - (ends - places)[texts]
    return (starts[texts] + step * nth).tolist()


def losses_of_text(
    model: nn.Module, ids: np.ndarray, chunk: int | None = None, **reading: Any
) -> np.ndarray:
    """Return the loss of each token after the first, nats, float32, (B, L - 1 - skip).

    Args:
        model, ids, chunk, reading: as for `logits_of_text`, `skip` included.
    """
    losses = [
        np.array(losses_of(logits, ids[:, start + 1 : start + 1 + logits.shape[1]]))
        for start, logits in logits_of_text(model, ids, chunk, **reading)
    ]
    return np.concatenate(losses, axis=1)


def losses_of(logits: mx.array, targets: np.ndarray) -> mx.array:
    """Return the cross-entropy of each token, nats, (B, L), for logits (B, L, V), ids (B, L)."""
    chosen = mx.array(np.asarray(targets, np.int32))[..., None]
    return log_sum_exp(logits) - mx.take_along_axis(logits, chosen, axis=-1)[..., 0]


def log_sum_exp(logits: mx.array) -> mx.array:
    """Return log sum exp over the vocabulary, in two stages, (B, L) for logits (B, L, V).

    On the CPU MLX adds float32 numbers one by one, which loses 1e-4 over 50,000 entries.
    """
    vocabulary = logits.shape[-1]
    whole = vocabulary - vocabulary % _BLOCK
    parts = []
    if whole:
        parts.append(mx.logsumexp(mx.unflatten(logits[..., :whole], -1, (-1, _BLOCK)), axis=-1))
    if whole < vocabulary:
        parts.append(mx.logsumexp(logits[..., whole:], axis=-1, keepdims=True))
    return mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)


def logits_of_text(
    model: nn.Module,
    ids: np.ndarray,
    chunk: int | None = None,
    *,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    head_chunk: int | None = None,
    skip: int = 0,
    on_read: Callable[[int], Any] = lambda tokens: None,
) -> Iterator[tuple[int, mx.array]]:
    """Yield the logits of texts of one length, a few tokens at a time.

    Args:
        model: from `load` or `attach`, or any model of mlx-lm.
        ids: token ids of the texts, (B, L).
        chunk: tokens in a chunk; a chunk uses the scale and gain of the length at its end.
            None uses those of the whole text.
        kv_bits: bits of a cached key or value; None does not quantise.
        kv_group_size: cached values that share a scale and a bias.
        head_chunk: tokens whose logits are in memory together; None takes as many as fit 16 MiB.
        skip: first tokens whose logits are not wanted; they are read, and cost no head.
        on_read: called with the number of tokens read since the last call.

    Yields:
        (start, logits): the index of the first of n tokens and the logits after each of them,
        float32, (B, n, V). The last token of a text has no logits.

    Raises:
        InputError: the length is beyond the model's reach, or its cache cannot be quantised
            with these settings.
        RunError: MLX failed, most often because memory ran out.
    """
    rows, length = ids.shape
    head_chunk = head_chunk or chunk_for(model)
    at_once, step = max(1, head_chunk // rows), max(1, _STEP // rows)
    text = mx.array(np.asarray(ids, np.int32))
    read = length - 1  # the last token has no target
    chunk = chunk or length
    caches = make_prompt_cache(model)
    for begin in range(0, read, chunk):
        end = min(begin + chunk, length)
        for start in range(begin, min(end, read), step):
            tokens = text[:, start : min(start + step, end, read)]
            with (
                generating(partial("at token {} of {}".format, start, length)),
                _inference(model),
            ):
                maybe_quantize_kv_cache(caches, 0, kv_group_size, kv_bits)
                for cache in planned_caches(caches):
                    cache.expected_length = end
                hidden = hidden_states(model, tokens, caches)
                mx.eval(hidden)
            for first in range(max(0, skip - start), tokens.shape[1], at_once):
                part = slice(first, first + at_once)
                yield start + first, logits_of(model, hidden[:, part], tokens[:, part])
            on_read(tokens.size)
            mx.clear_cache()


def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the weighted mean loss of batches, one pass each, nats; NaN without any token."""
    chunk = chunk_for(model)
    total = counted = 0.0
    with _inference(model):
        for batch in batches:
            tokens, targets, weights = (mx.array(a) for a in batch)
            total += float(summed_loss(model, tokens, targets, weights, chunk))
            counted += float(batch.weights.sum())
            mx.clear_cache()
    return total / counted if counted else math.nan


def check_lengths(
    model: nn.Module, corpus: Corpus, lengths: Sequence[int], option: str = "--lengths"
) -> None:
    """Refuse lengths that `score` cannot measure.

    Args:
        model: the model to measure.
        corpus: the text.
        lengths: lengths of the windows, tokens.
        option: the name of the option that gave them, for messages.

    Raises:
        InputError: a length is below 2, beyond the model's reach or larger than the corpus.
    """
    there = len(corpus.tokens)
    for length in lengths:
        if length < 2:
            raise InputError(f"{option} must be at least 2 tokens, got {length}.")
        scaled(model).check_length(length, f"A sequence of {option}")
        if length > there:
            fitting = ", ".join(str(n) for n in lengths if n <= there)
            raise InputError(
                f"{corpus.name} has {there} tokens, too few for a length of {length}. Lengths that "
                f"fit: {fitting or 'none'}. Give more text or shorter lengths."
            )


def check_targets(
    corpus: Corpus, lengths: Sequence[int], targets: int, option: str = "--lengths"
) -> None:
    """Refuse lengths whose windows cannot have the same targets.

    Args:
        corpus: the text.
        lengths: lengths of the windows, tokens.
        targets: scored tokens at the end of each window.
        option: the name of the option that gave the lengths, for messages.

    Raises:
        InputError: a length is below `targets`, or larger than every text.
    """
    if min(lengths, default=targets) < targets:
        raise InputError(
            f"{option} {min(lengths)} is below the trained length: with the same targets, the last "
            f"{targets} tokens of each window are scored. Give lengths of at least {targets}."
        )
    largest = int((corpus.ends - corpus.starts).max())
    if max(lengths, default=0) > largest:
        raise InputError(
            f"No text of {corpus.name} has {max(lengths)} tokens (the longest has {largest}), and "
            f"a window with the same targets lies within one text. Give longer texts or a shorter "
            f"{option}."
        )


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Put the model into inference mode and silence the warning about its reach."""
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            # Measuring beyond the reach is a purpose of this module.
            warnings.filterwarnings("ignore", ".* that this model's scaling is made for")
            yield
    finally:
        model.train(training)
