"""The six golden checkpoints, converted and loaded, against the published code's answers.

Most of the difference to the CLEX logits is the float32 solve of the published code,
1e-5 in the frequencies times the position. With its frequencies put in place of ours the
logits agree to 5e-5; with ours, which a finer solve confirms, to 1e-3. The fast cosine and sine of
a GPU add to both.
"""

import mlx.core as mx
import pytest

from mlx_clex import load, make_prompt_cache

from .conftest import FAST_ROPE, GOLDEN, GOLDEN_NAMES

EXACT = 2e-4 if FAST_ROPE else 5e-5
OWN_SOLVE = 1e-3


class Checkpoint:
    def __init__(self, name, folder):
        self.name = name
        self.answers = mx.load(str(GOLDEN / name / "golden.safetensors"))
        self.ids = self.answers["input_ids"]
        self.model, _ = load(folder)
        self.model.set_dtype(mx.float32)
        self.clex = "frequencies" in self.answers
        self.tolerance = OWN_SOLVE if self.clex else EXACT

    def use_published_frequencies(self):
        """Answer from the published table, to tell the solve from everything else."""
        table = self.answers["frequencies"]
        tables = {(float(t + 1), 0): (table[t], 1 / table[t]) for t in range(table.shape[0])}
        self.model.scaling.inv_freq(1.0)
        self.model.scaling._solved.tables = tables
        self.tolerance = EXACT

    def keys(self, prefix):
        found = [key for key in self.answers if key.startswith(prefix)]
        for key in found:
            yield key, [int(n) for n in key[len(prefix) :].split("_")]

    def compare(self, key, ours):
        error = mx.abs(ours - self.answers[key]).max().item()
        assert error < self.tolerance, f"{self.name} {key}: {error:.1e}"


@pytest.fixture(params=GOLDEN_NAMES)
def checkpoint(request, converted):
    return Checkpoint(request.param, converted(request.param))


@pytest.fixture(params=["own solve", "published frequencies"])
def either(request, checkpoint):
    if request.param == "published frequencies":
        if not checkpoint.clex:
            checkpoint.tolerance = EXACT
        else:
            checkpoint.use_published_frequencies()
    return checkpoint


def test_one_pass(either):
    """prefill_logits_n: the first n tokens at once, no cache."""
    for key, (n,) in either.keys("prefill_logits_"):
        either.compare(key, either.model(either.ids[:1, :n])[:, -8:])


def test_two_rows_in_one_pass(either):
    """batch_logits_n: both rows, the first n tokens of each."""
    for key, (n,) in either.keys("batch_logits_"):
        either.compare(key, either.model(either.ids[:, :n])[:, -8:])


def test_decoding_across_steps_of_the_scale(either):
    """decode_logits_a_b: a tokens at once, then one at a time; old keys move with t."""
    for key, (a, b) in either.keys("decode_logits_"):
        cache = make_prompt_cache(either.model)
        passes = [either.model(either.ids[:1, :a], cache=cache)[:, -1:]]
        passes += [either.model(either.ids[:1, i : i + 1], cache=cache) for i in range(a, b)]
        either.compare(key, mx.concatenate(passes, axis=1))


def test_chunks_that_grow(either):
    """chunked_logits_c: the published perplexity protocol, the scale growing by chunks."""
    for key, (size,) in either.keys("chunked_logits_"):
        cache = make_prompt_cache(either.model)
        for start in range(0, either.ids.shape[1] // size * size, size):
            logits = either.model(either.ids[:1, start : start + size], cache=cache)
        either.compare(key, logits)


def test_every_kind_of_answer_is_there():
    """A golden file without a key would make the tests above pass on nothing."""
    kinds = {"prefill_logits", "batch_logits", "decode_logits"}
    for name in GOLDEN_NAMES:
        keys = mx.load(str(GOLDEN / name / "golden.safetensors")).keys()
        wanted = kinds | ({"chunked_logits", "frequencies"} if "clex" in name else set())
        assert all(any(key.startswith(kind) for key in keys) for kind in wanted), name
    assert len(GOLDEN_NAMES) == 6


@pytest.mark.parametrize("step", [37, 25, 1])
def test_a_planned_prefill_in_chunks_is_the_single_pass(checkpoint, step):
    """`prompt`: scale and gain of the whole, whatever the size of the chunks."""
    n = 100 if step == 1 else checkpoint.ids.shape[1]
    cache = make_prompt_cache(checkpoint.model, expected_length=n)
    parts = [
        checkpoint.model(checkpoint.ids[:1, i : min(i + step, n)], cache=cache)
        for i in range(0, n, step)
    ]
    whole = checkpoint.model(checkpoint.ids[:1, :n])
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < EXACT


def test_gene_frequencies(checkpoint):
    """frequencies_rX: first layer, at the scale X."""
    for key, (scale,) in checkpoint.keys("frequencies_r"):
        ours = checkpoint.model.scaling.inv_freq(float(scale))
        error = mx.abs(ours / checkpoint.answers[key] - 1).max().item()
        assert error < 1e-6, f"{key}: {error:.1e}"


def test_log_scale_is_read_as_each_family_reads_it(checkpoint):
    """LLaMA applies it, Mixtral has the key in its config and ignores it."""
    log_scale = checkpoint.model.scaling.config.log_scale
    assert log_scale == (checkpoint.name == "clex_llama_gqa_log_scale")


def test_the_reach_is_that_of_the_release(checkpoint):
    """CLEX refuses more than L0 32 times max_factor 8; GeNE refuses nothing."""
    assert checkpoint.model.limit == (256 if checkpoint.clex else None)
