"""Losses that are read in steps equal plain computations; windows lie where they should."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_clex import attach
from mlx_clex.data.corpus import Corpus
from mlx_clex.errors import InputError
from mlx_clex.evaluation import perplexity as evaluation
from mlx_clex.evaluation.intervals import paired_ratio, student_t
from mlx_clex.evaluation.perplexity import (
    Protocol,
    Score,
    score,
    windows_of,
)

from ..conftest import CONFIGS, GOLDEN_NAMES, L0, scaled_llama, tiny_llama
from ..oracle import Oracle
from ..test_golden import Checkpoint

IDS = np.random.default_rng(0).integers(0, 64, 300).astype(np.uint32)


def corpus(*sizes):
    """Return texts of these sizes, in tokens."""
    ends = np.cumsum(sizes)
    tokens = np.resize(IDS, ends[-1])
    return Corpus("the text", tokens, ends - sizes, np.zeros(len(sizes), int))


def read(model, ids, *args, **options):
    """Return the losses of one text."""
    return evaluation.losses_of_text(model, ids[None], *args, **options)[0]


def cross_entropy(logits, targets):
    targets = mx.array(np.asarray(targets, np.int32))
    return np.array(nn.losses.cross_entropy(logits.astype(mx.float32), targets))


def plain_losses(model, ids):
    """Return the losses of one pass over all tokens, without a cache."""
    logits = model(mx.array(np.asarray(ids, np.int32))[None])[0]
    return cross_entropy(logits[:-1], ids[1:])


@pytest.mark.filterwarnings("ignore:.*past the")  # by the plain pass
@pytest.mark.parametrize(
    ("name", "log_scale"),
    [*((name, False) for name in CONFIGS), *((n, True) for n in ("clex", "gene", "gene-param"))],
)
def test_losses_of_steps_equal_losses_of_one_pass(name, log_scale, monkeypatch):
    """A step used the scale of the tokens read so far, not of the whole text."""
    monkeypatch.setattr(evaluation, "_STEP", 37)
    model = scaled_llama(name, log_scale=log_scale)
    ours = read(model, IDS[:200], head_chunk=10)
    theirs = plain_losses(model, IDS[:200])
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", ["none", "dynamic", "clex", "gene-param"])
def test_chunked_losses_equal_those_of_unrotated_caches(name, monkeypatch):
    """The oracle caches unrotated keys and rotates all of them for each chunk."""
    monkeypatch.setattr(evaluation, "_STEP", 7)
    model = scaled_llama(name)
    oracle = Oracle(model)
    text = mx.array(IDS[:250].astype(np.int32))[None]
    logits = mx.concatenate([oracle(text[:, n : n + 24]) for n in range(0, 250, 24)], axis=1)
    theirs = cross_entropy(logits[0, :-1], IDS[1:250])
    # CLEX's random network turns up to 80 radians per token: at position 250 float32 rounds
    # angles by 1e-3. The other methods agree within 4e-6.
    tolerance = 4e-3 if name == "clex" else 1e-5
    assert np.abs(read(model, IDS[:250], 24) - theirs).max() < tolerance


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_losses_equal_those_of_the_published_code(name, converted, monkeypatch):
    """prefill_logits_n is the protocol *whole*, chunked_logits_c the protocol *chunked*."""
    monkeypatch.setattr(evaluation, "_STEP", 50)
    checkpoint = Checkpoint(name, converted(name))
    if checkpoint.clex:
        checkpoint.use_published_frequencies()
    ids = np.array(checkpoint.ids[0])
    for key, (n,) in checkpoint.keys("prefill_logits_"):
        theirs = cross_entropy(checkpoint.answers[key][0, :-1], ids[n - 7 : n])
        assert np.abs(read(checkpoint.model, ids[:n])[-7:] - theirs).max() < 1e-4
    for key, (size,) in checkpoint.keys("chunked_logits_"):
        n = len(ids) // size * size
        theirs = cross_entropy(checkpoint.answers[key][0, :-1], ids[n - size + 1 : n])
        ours = read(checkpoint.model, ids[:n], size)
        assert np.abs(ours[1 - size :] - theirs).max() < 1e-4


@pytest.mark.parametrize("vocabulary", [64, 256, 49_999, 51_200])
def test_losses_over_a_large_vocabulary(vocabulary):
    """A plain float32 sum made every loss 5e-5 too small."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, vocabulary)) * 3 + 10).astype(np.float32)
    targets = rng.integers(0, vocabulary, 4)
    exact = logits.astype(np.float64)
    exact = np.log(np.exp(exact).sum(-1)) - exact[np.arange(4), targets]
    ours = np.array(evaluation.losses_of(mx.array(logits)[None], targets[None]))[0]
    assert np.abs(ours - exact).max() < 5e-6


def test_which_tokens_count():
    """Whole and sliding skip the first token; chunked skips the first token of each chunk."""
    model, text = scaled_llama("clex"), corpus(300)
    whole = score(model, text, 100, 3)
    assert whole.tokens == 3 * 99
    means = [plain_losses(model, IDS[n : n + 100]).mean() for n in (0, 100, 200)]
    assert np.allclose(whole.losses, means, atol=1e-5)

    chunked = score(model, text, 100, 1, Protocol(chunk=30))
    losses = read(model, IDS[:100], 30)
    counting = [n - 1 for n in range(1, 100) if n not in (30, 60, 90)]
    assert chunked.tokens == 96
    assert math.isclose(chunked.loss, losses[counting].mean(), rel_tol=1e-6)

    sliding = score(model, text, 100, 99, Protocol(stride=80))
    means = [plain_losses(model, IDS[n : n + 100]).mean() for n in (0, 80, 160)]
    assert sliding.tokens == 3 * 99
    assert np.allclose(sliding.losses, means, atol=1e-5)


def test_the_same_targets_have_more_context_at_longer_lengths():
    """Whole windows compared other tokens at every length, early ones among them."""
    model, text, protocol = scaled_llama("clex"), corpus(330), Protocol(targets=20)
    scores = [score(model, text, n, 3, protocol, longest=100) for n in (20, 50, 100)]
    for found, length in zip(scores, (20, 50, 100), strict=True):
        assert found.tokens == 3 * 19
        ends = (100, 200, 300)
        means = [plain_losses(model, IDS[end - length : end])[-19:].mean() for end in ends]
        assert np.allclose(found.losses, means, atol=1e-5)


def test_skipped_logits_are_not_computed():
    """Only the last tokens of a window count, so the head need not read the others."""
    model, ids = scaled_llama("clex"), IDS[None, :90]
    found = list(evaluation.logits_of_text(model, ids, head_chunk=16, skip=70))
    assert [(start, logits.shape[1]) for start, logits in found] == [(70, 16), (86, 3)]
    assert np.allclose(read(model, ids[0], skip=70), read(model, ids[0])[70:], atol=1e-5)


def test_short_windows_are_read_in_one_batch():
    """Batched windows have the same losses as single ones."""
    for name in ("dynamic", "clex"):
        model, text, calls = scaled_llama(name), corpus(300), []
        together = score(model, text, 20, 99, Protocol(chunk=8), on_read=calls.append)
        assert calls == [15 * 8, 15 * 8, 15 * 3]
        parts = (text.part(n, n + 20, "a window") for n in range(0, 300, 20))
        alone = [score(model, part, 20, 1, Protocol(chunk=8)).loss for part in parts]
        assert np.allclose(together.losses, alone, atol=1e-5)


def test_windows_lie_within_texts():
    """A window crossed the end of a text although other texts were long enough."""
    assert windows_of(corpus(100), 40, 8) == [0, 40]
    assert windows_of(corpus(30, 100, 39, 40), 40, 8) == [30, 70, 169]
    # More places than windows: they are spread evenly.
    assert windows_of(corpus(1000), 10, 4) == [0, 330, 660, 990]
    # No text is long enough: all texts are joined.
    assert windows_of(corpus(30, 30, 30), 40, 8) == [0, 40]
    assert windows_of(corpus(100, 60), 50, 9, stride=20) == [0, 20, 40, 100]


def test_lengths_are_measured_on_the_same_texts():
    """Perplexity fell with length because longer lengths skipped more of the short texts."""
    texts = corpus(30, 100, 39, 40)
    assert windows_of(texts, 30, 9, longest=100) == [30, 60, 90]
    assert windows_of(texts, 100, 9, longest=100) == [30]
    assert windows_of(texts, 100, 9, longest=101) == [0, 100]


def test_quantised_caches_change_the_loss_a_little():
    """8 bits must change the loss less than 4 bits."""
    for name in ("ntk", "clex"):
        model, text = scaled_llama(name), corpus(200)
        plain, eight, four = (
            score(model, text, 100, 2, kv_bits=bits, kv_group_size=32).loss for bits in (None, 8, 4)
        )
        assert 0 < abs(eight - plain) < 1e-2
        assert abs(eight - plain) < abs(four - plain)


def test_a_cache_that_cannot_be_quantised_is_refused():
    """mlx-lm's own error was a traceback."""
    with pytest.raises(InputError, match="this --kv-bits and --kv-group-size"):
        score(scaled_llama("ntk"), corpus(100), 50, 1, kv_bits=4)


def test_the_training_mode_is_restored():
    """A model stayed in evaluation mode after a measurement."""
    for training in (True, False):
        model = scaled_llama("clex").train(training)
        score(model, corpus(100), 50, 1)
        assert model.training is training


def test_memory_does_not_grow_with_the_length():
    """With a vocabulary of 128,000 the logits of 32,768 tokens have 16.8 GB.

    Memory holds three arrays of one chunk of logits, for any length of text.
    """
    model = attach(tiny_llama(vocabulary=128_000, layers=1), {"type": "clex", "max_factor": 64})
    ids = np.random.default_rng(0).integers(0, 128_000, 512)

    def peak(work):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        work()
        return mx.get_peak_memory() - before

    assert peak(lambda: mx.eval(model(mx.array(ids)[None]))) > 512 * 128_000 * 4
    short, long = (peak(lambda n=n: read(model, ids[:n])) for n in (128, 512))
    assert long < 110e6
    assert long - short < 2e6


def test_confidence_interval():
    """Computed by hand: losses 1 to 5, mean 3, standard error sqrt(2.5 / 5), t(4) = 2.7764."""
    few = Score(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 50)
    assert math.isclose(few.perplexity, math.exp(3))
    assert few.interval is not None
    low, high = few.interval
    assert math.isclose(math.log(low), 3 - 2.7764 / math.sqrt(2), rel_tol=5e-3)
    assert math.isclose(math.log(high), 3 + 2.7764 / math.sqrt(2), rel_tol=5e-3)


def test_paired_ratio():
    """Windows differ by 4 nats, their paired differences by 0.02: mean 0.3, t(4) = 2.7764."""
    hard = np.array([1.0, 5.0, 2.0, 3.0, 4.0])
    ratio = paired_ratio(np.add(hard, [0.28, 0.32, 0.29, 0.31, 0.3]), hard)
    assert math.isclose(ratio.value, math.exp(0.3))
    margin = 2.7764 * math.sqrt(0.001 / 4 / 5)
    assert ratio.interval is not None
    assert np.allclose(np.log(ratio.interval), (0.3 - margin, 0.3 + margin), atol=1e-4)
    assert paired_ratio([1.0] * 4, [1.0] * 4).interval is None


def test_few_windows_have_no_interval():
    """Two windows gave "low 1.8e-12, high 2e19"; a perplexity is never below 1."""
    assert Score(np.array([1.0, 9.0, 2.0, 5.0]), 40).interval is None
    low, _ = Score(np.array([0.1, 9.0, 0.2, 0.1, 0.1]), 50).interval or (0, 0)
    assert low == 1.0


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(4, 2.7764), (5, 2.5706), (7, 2.3646), (10, 2.2281), (120, 1.9799)],
)
def test_students_t(freedom, quantile):
    """The expected values are from printed tables, two-sided 95 %."""
    assert math.isclose(student_t(0.95, freedom), quantile, rel_tol=3e-3)


def test_unusable_lengths_are_refused():
    """The message must list the lengths that fit."""
    with pytest.raises(InputError, match=r"300 tokens, too few .* 400.* fit: 16, 300"):
        evaluation.check_lengths(tiny_llama(), corpus(300), [16, 400, 300])
    with pytest.raises(InputError, match="at least 2 tokens, got 1"):
        score(tiny_llama(), corpus(300), 1, 1)
    with pytest.raises(InputError, match="this model reaches"):
        score(scaled_llama("clex"), corpus(900), 20 * L0 + 1, 1)
    with pytest.raises(InputError, match=r"--lengths 16 is below .* last 32 .* least 32"):
        evaluation.check_targets(corpus(300), [16, 100], 32)
    with pytest.raises(InputError, match=r"No text of the text has 100 tokens .* has 90\)"):
        evaluation.check_targets(corpus(90, 80), [32, 100], 32)
    with pytest.raises(InputError, match="--chunk must be at least 2 tokens, got 1"):
        Protocol(chunk=1)
    with pytest.raises(InputError, match="--stride must be at least 1"):
        Protocol(stride=0)
