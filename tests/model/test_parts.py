"""Long passes are read in parts, which change no answer."""

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from mlx_clex.model import parts
from mlx_clex.model.chunked_loss import hidden_states
from mlx_clex.model.parts import part_length
from mlx_clex.model.scaled_model import make_prompt_cache

from ..conftest import scaled_llama

HEADS = 4
CASES = [("clex", False), ("clex", True), ("gene", True), ("gene-param", False), ("yarn", False)]


@pytest.fixture
def lengths(monkeypatch):
    """Lengths of the passes of the stock model; at most 64 x 150 scores a head."""
    monkeypatch.setattr(parts, "MOST_SCORES", HEADS * 64 * 150)
    seen = []
    stock = llama.Model.__call__

    def call(self, inputs, cache=None, input_embeddings=None):
        seen.append(inputs.shape[1])
        return stock(self, inputs, cache, input_embeddings)

    monkeypatch.setattr(llama.Model, "__call__", call)
    return seen


def test_the_step_shrinks_as_the_cache_grows():
    """At 131,072 tokens, one attention of 2,048 took seconds, and macOS ended it."""
    steps = [part_length(2048, cached, 32) for cached in (0, 30_000, 63_488, 129_024)]
    assert steps == [2048, 2048, 1024, 512]
    assert part_length(2048, 10**9, 32) == parts.FEWEST
    assert part_length(100, 0, 32) == 100


@pytest.mark.filterwarnings("ignore:.*past the.*that this model's scaling")
@pytest.mark.parametrize(("name", "log_scale"), CASES)
def test_a_pass_in_parts_is_the_pass(name, log_scale, tokens, lengths, monkeypatch):
    """Scale, gain and positions are those of the whole pass, with and without keys that move."""
    model = scaled_llama(name, log_scale=log_scale)
    lengths.clear()
    cache, whole_cache = make_prompt_cache(model), make_prompt_cache(model)
    read = [model(tokens[:1, a:b], cache=cache) for a, b in ((0, 90), (90, 240), (240, 241))]
    assert lengths == [90, 50, 50, 50, 1]

    lengths.clear()
    monkeypatch.setattr(parts, "MOST_SCORES", 1 << 40)
    whole = [model(tokens[:1, a:b], cache=whole_cache) for a, b in ((0, 90), (90, 240), (240, 241))]
    assert lengths == [90, 150, 1]
    for ours, theirs in zip(read, whole, strict=True):
        assert mx.abs(ours - theirs).max().item() < 1e-4


def test_rows_count_and_their_padding_stays(tokens, lengths, monkeypatch):
    """Eight prompts at once have eight times the scores of one."""
    model = scaled_llama("clex")
    caches = [make_prompt_cache(model) for _ in range(2)]
    for row, length in enumerate((30, 70)):
        mx.eval(model(tokens[row : row + 1, :length], cache=caches[row]))
    merged, again = (
        [type(pair[0]).merge(pair) for pair in zip(*caches, strict=True)] for _ in range(2)
    )
    lengths.clear()
    ours = model(tokens[:2, 100:230], cache=merged)
    assert lengths == [44, 44, 42]
    monkeypatch.setattr(parts, "MOST_SCORES", 1 << 40)
    assert mx.abs(ours - model(tokens[:2, 100:230], cache=again)).max().item() < 1e-4


def test_losses_read_the_output_of_all_parts(tokens, lengths, monkeypatch):
    """`perplexity` took the first part for the whole."""
    model = scaled_llama("clex")
    lengths.clear()
    ours = hidden_states(model, tokens[:1, :200], make_prompt_cache(model))
    assert lengths == [50] * 4
    monkeypatch.setattr(parts, "MOST_SCORES", 1 << 40)
    theirs = hidden_states(model, tokens[:1, :200], make_prompt_cache(model))
    assert mx.abs(ours - theirs).max().item() < 1e-4


def test_what_cannot_be_cut_is_read_at_once(tokens, lengths):
    """A pass without a cache has nowhere to keep its first part."""
    model = scaled_llama("clex")
    lengths.clear()
    model(tokens[:1, :200])
    assert lengths == [200]
