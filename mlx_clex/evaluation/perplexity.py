"""Loss and perplexity of a model as inference runs it.

A text is read as a prompt is: in steps, through a cache that is planned for its length, so
that every token has the scale and gain of the whole, or of its chunk. The head runs on a
few tokens at a time. So neither all logits nor all attention scores are ever there at once.

Not covered: batches of rows, which `mean_loss` reads in one pass for training's own loss.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache

from ..data.batch import Batch
from ..data.corpus import Corpus
from ..errors import InputError, generating
from ..model.head import chunk_length, hidden_states, logits_of, summed_loss
from ..model.plans import planned_caches
from ..model.scaled_model import make_prompt_cache, scaled

FEWEST_WINDOWS = 5  # from which an interval means something
_STEP = 512  # tokens read at once, of all rows; attention scores are (H, _STEP, L)
_BLOCK = 256  # tokens of the vocabulary that are added up one after the other


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How windows of a text are read, and which of their tokens count.

    With neither field (*whole*), each is read at the one scale of its length, and all its
    tokens count but the first, which nothing comes before.

    With a chunk (*chunked*), it is fed in chunks, each at the scale of what has been read by
    its end, and the first token of each does not count. CLEX was published with figures of
    this kind; its chunk was the trained length.

    With a stride (*sliding*), windows overlap: the next one begins so many tokens further on.
    Each is read and counted as in *whole*. GeNE was published with figures of this kind; its
    stride was 1,024.
    """

    chunk: int | None = None  # tokens
    stride: int | None = None  # tokens from the start of a window to that of the next

    def __post_init__(self) -> None:
        for name, value, least in (("chunk", self.chunk, 2), ("stride", self.stride, 1)):
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least} tokens, got {value}.")

    def counts(self, length: int) -> np.ndarray:
        """Which tokens of a window count, from its second one on, bool, (length - 1,)."""
        positions = np.arange(1, length)
        return positions % (self.chunk or length) != 0


WHOLE = Protocol()


@dataclass(frozen=True)
class Score:
    """Losses of some windows of one length."""

    losses: np.ndarray  # mean of each window, nats, (W,)
    tokens: int  # how many count in all of them together, equally many in each

    @property
    def loss(self) -> float:
        """Mean over all tokens that count, nats."""
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return exp(self.loss)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the perplexity; None below five windows.

        From how much windows differ: Student's t for the mean loss, exponentiated, and at
        least 1. Overlapping windows differ less than so many apart would.
        """
        count = len(self.losses)
        if count < FEWEST_WINDOWS:
            return None
        margin = student_t(0.95, count - 1) * float(self.losses.std(ddof=1)) / math.sqrt(count)
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
    """Measure windows of one length.

    Args:
        model: from `load` or `attach`, or any other of mlx-lm.
        corpus: the texts; `windows_of` says where windows lie in them.
        length: of a window, in tokens.
        windows: how many at most.
        protocol: how they are read.
        longest: of the lengths that this one is to be held against; see `windows_of`.
        reading: kv_bits, kv_group_size and on_read of `logits_of_text`.

    Raises:
        InputError: the texts are shorter than that, or the model's reach is.
    """
    check_lengths(model, corpus, [length])
    starts = windows_of(corpus, length, windows, protocol.stride, longest)
    counts = protocol.counts(length)
    losses: list[float] = []
    rows = max(1, _STEP // length)
    for batch in (starts[at : at + rows] for at in range(0, len(starts), rows)):
        ids = np.stack([corpus.tokens[start : start + length] for start in batch])
        of_rows = losses_of_text(model, ids, protocol.chunk, **reading)
        losses += of_rows[:, counts].mean(axis=1, dtype=np.float64).tolist()
    return Score(np.array(losses), len(losses) * int(counts.sum()))


def perplexity(model: nn.Module, corpus: Corpus, length: int, windows: int) -> float:
    """Perplexity of whole windows of one length; arguments as those of `score`."""
    return score(model, corpus, length, windows).perplexity


def windows_of(
    corpus: Corpus,
    length: int,
    count: int,
    stride: int | None = None,
    longest: int | None = None,
) -> list[int]:
    """Where windows begin in the corpus, spread evenly over all places there are.

    A window lies within one text, at a multiple of the stride (None: of the length). Texts
    shorter than `longest` (None: the length) are left out, so that figures of several lengths
    are of the same texts. Where no text is as long as that, all are joined end to end.
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
    """Loss of each token of texts but the first, nats, float32, (B, L - 1).

    Args:
        model, ids, chunk, reading: those of `logits_of_text`.
    """
    losses = [
        np.array(losses_of(logits, ids[:, start + 1 : start + 1 + logits.shape[1]]))
        for start, logits in logits_of_text(model, ids, chunk, **reading)
    ]
    return np.concatenate(losses, axis=1)


def losses_of(logits: mx.array, targets: np.ndarray) -> mx.array:
    """Cross-entropy of each token, nats, (B, L), for logits (B, L, V) and ids (B, L)."""
    chosen = mx.array(np.asarray(targets, np.int32))[..., None]
    return log_sum_exp(logits) - mx.take_along_axis(logits, chosen, axis=-1)[..., 0]


def log_sum_exp(logits: mx.array) -> mx.array:
    """log sum exp over the vocabulary, in two stages, (B, L) for (B, L, V).

    MLX's CPU adds up one after the other in float32: over 50,000 tokens it loses 1e-4.
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
    on_read: Callable[[int], Any] = lambda tokens: None,
) -> Iterator[tuple[int, mx.array]]:
    """Logits for texts of one length, a few tokens at a time.

    Args:
        model: from `load` or `attach`, or any other of mlx-lm.
        ids: the texts, (B, L).
        chunk: tokens whose scale and gain are those of what has been read by their end;
            None: those of the whole text for all of it.
        kv_bits: quantise keys and values to so many bits as they are read.
        kv_group_size: how many of them share a scale and a bias.
        head_chunk: tokens whose logits are there at once; None takes what 16 MiB hold.
        on_read: is told how many more tokens have been read.

    Yields:
        Index of the first of n tokens, and the logits that follow them, float32, (B, n, V):
        for all tokens but the last one.

    Raises:
        InputError: the length is beyond the model's reach, or the cache of this model
            cannot be quantised so.
        RunError: MLX failed, for want of memory above all.
    """
    rows, length = ids.shape
    head_chunk = head_chunk or chunk_length(getattr(model.args, "vocab_size", 32_000))
    at_once, step = max(1, head_chunk // rows), max(1, _STEP // rows)
    text = mx.array(np.asarray(ids, np.int32))
    read = length - 1  # what follows the last token is not known
    chunk = chunk or length
    caches = make_prompt_cache(model)
    for begin in range(0, read, chunk):
        end = min(begin + chunk, length)
        for start in range(begin, min(end, read), step):
            tokens = text[:, start : min(start + step, end, read)]
            with (
                generating(partial("at token {} of {}".format, start, length)),
                _inference(model),
                _quantising(kv_bits, kv_group_size),
            ):
                maybe_quantize_kv_cache(caches, 0, kv_group_size, kv_bits)
                for cache in planned_caches(caches):
                    cache.expected_length = end
                hidden = hidden_states(model, tokens, caches)
                mx.eval(hidden)
            for first in range(0, tokens.shape[1], at_once):
                part = slice(first, first + at_once)
                yield start + first, logits_of(model, hidden[:, part], tokens[:, part])
            on_read(tokens.size)
            mx.clear_cache()


def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean loss of the tokens that count, each batch in one pass, nats; NaN without any."""
    chunk = chunk_length(getattr(model.args, "vocab_size", 32_000))
    total = counted = 0.0
    with _inference(model):
        for batch in batches:
            tokens, targets, weights = (mx.array(a) for a in batch)
            total += float(summed_loss(model, tokens, targets, weights, chunk))
            counted += float(batch.weights.sum())
            mx.clear_cache()
    return total / counted if counted else math.nan


def check_lengths(model: nn.Module, corpus: Corpus, lengths: Sequence[int]) -> None:
    """Refuse lengths that `score` cannot be asked for.

    Raises:
        InputError: the message has the length, and what there is.
    """
    there = len(corpus.tokens)
    for length in lengths:
        if length < 2:
            raise InputError(f"A length to evaluate at must be at least 2 tokens, got {length}.")
        scaled(model).check_length(length, "A sequence of --lengths")
        if length > there:
            fitting = ", ".join(str(n) for n in lengths if n <= there)
            raise InputError(
                f"{corpus.name} has {there} tokens, too few for a length of {length}: give more "
                f"text, or leave out what does not fit (of these lengths {fitting or 'none'} fit)."
            )


def student_t(level: float, freedom: int) -> float:
    """Return what the size of Student's t stays below with the probability `level`.

    Args:
        level: above 0, below 1.
        freedom: degrees of freedom, at least 4; there the error is 0.3 %, and less above.

    Source: Abramowitz and Stegun, 26.7.5, the expansion about the normal distribution.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def exp(loss: float) -> float:
    """e^loss, or the largest there is as a float."""
    return math.exp(min(loss, 700))


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Without dropout, with the frequencies that inference has, past the reach in silence."""
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            # To find out how much worse it gets is what this is for.
            warnings.filterwarnings("ignore", ".* that this model's scaling is made for")
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _quantising(bits: int | None, group_size: int) -> Iterator[None]:
    """Say in our words that a cache cannot be quantised."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if bits is None or isinstance(error, InputError):
            raise
        raise InputError(
            f"The cache of this model cannot be quantised with --kv-bits {bits} "
            f"--kv-group-size {group_size}: {error}"
        ) from error
