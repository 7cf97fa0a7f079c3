"""Caches with a scale give the same logits as keys rotated afresh at every pass."""

import copy
import itertools

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlx_clex import attach, make_prompt_cache
from mlx_clex.errors import InputError
from mlx_clex.model.cache import ScaledBatchKVCache, ScaledKVCache, ScaledQuantizedKVCache
from mlx_clex.scaling import SCALINGS

from ..conftest import scaled_llama, tiny_llama
from ..oracle import Oracle

# Texts here are longer than what static methods are made for.
pytestmark = pytest.mark.filterwarnings("ignore:.*past the.*that this model's scaling")

TOLERANCE = 2e-4
GROWING = ["dynamic", "yarn-t", "clex", "gene", "gene-param"]
LOG_SCALE = ["clex", "gene", "gene-param"]
MODELS = [(name, False) for name in SCALINGS] + [(name, True) for name in LOG_SCALE]


def close(a, b, tolerance=TOLERANCE):
    error = mx.abs(a - b).max().item()
    assert error < tolerance, f"differs by {error:.1e}"


def mean_error(model, ids, cache, oracle):
    """Return the mean absolute difference of the logits over single-token passes."""
    errors = [
        mx.abs(model(ids[:, i : i + 1], cache=cache) - oracle(ids[:, i : i + 1])).mean().item()
        for i in range(ids.shape[1])
    ]
    return sum(errors) / len(errors)


def read(model, ids, sizes, cache, oracle):
    """Feed `ids` (1, L) in passes of these sizes to both, comparing every pass."""
    start = 0
    for size in sizes:
        part = ids[:, start : start + size]
        close(model(part, cache=cache), oracle(part))
        start += size
    return start


@pytest.fixture(params=MODELS, ids=lambda m: m[0] + ("+log_scale" if m[1] else ""))
def model(request):
    name, log_scale = request.param
    return scaled_llama(name, log_scale=log_scale, key_heads=4 if "param" in name else 2)


@pytest.fixture(params=GROWING)
def growing(request):
    return scaled_llama(request.param, log_scale=request.param in LOG_SCALE)


def test_decoding_across_steps_equals_keys_rotated_afresh(model, tokens):
    """Chunks, then single tokens, over several steps of the scale."""
    ids = tokens[:1]
    read(model, ids, [10, 30, 1, 1, 60] + [1] * 40, make_prompt_cache(model), Oracle(model))


def test_a_planned_prompt_in_odd_chunks_equals_one_pass(model, tokens):
    """With `prompt`, the whole prompt sets scale and gain from the first chunk on."""
    ids = tokens[:, :150]
    cache = make_prompt_cache(model, expected_length=123)
    whole = model(ids[:1, :123])
    parts = [model(ids[:1, i : min(i + 37, 123)], cache=cache) for i in range(0, 123, 37)]

    close(mx.concatenate(parts, axis=1), whole)
    oracle = Oracle(model, expected_length=123)
    oracle(ids[:1, :123])
    for i in range(123, 150):
        close(model(ids[:1, i : i + 1], cache=cache), oracle(ids[:1, i : i + 1]))


def test_while_nothing_changes_decoding_equals_one_pass(model, tokens):
    """At one scale and gain, decoding token by token must equal one pass."""
    ids = tokens[:1, :16]
    cache = make_prompt_cache(model, expected_length=16)
    parts = [model(ids[:, i : i + 1], cache=cache) for i in range(16)]

    close(mx.concatenate(parts, axis=1), model(ids))


def test_trimming_back_over_a_step_moves_keys_back(growing, tokens):
    """Speculative decoding and edited prompts trim the cache; the scale must follow."""
    cache, oracle = make_prompt_cache(growing), Oracle(growing)
    position = read(growing, tokens[:1], [30, 40, 1], cache, oracle)
    before = cache[0].scale
    assert trim_prompt_cache(cache, 50) == 50
    oracle.trim(50)
    read(growing, tokens[1:2, position:], [1, 3], cache, oracle)

    assert cache[0].scale <= before
    assert trim_prompt_cache(cache, 1000) == 25, "trimmed to nothing"
    read(growing, tokens[2:3], [20, 30], cache, Oracle(growing))


def test_a_saved_cache_goes_on_where_it_was(growing, tokens, tmp_path):
    """mlx-lm's own functions must save and load the scale and the plan."""
    cache, oracle = make_prompt_cache(growing, 60), Oracle(growing, 60)
    position = read(growing, tokens[:1], [50], cache, oracle)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"model": "tiny"})
    restored, metadata = load_prompt_cache(
        str(tmp_path / "cache.safetensors"), return_metadata=True
    )

    assert metadata == {"model": "tiny"}
    assert [type(c) for c in restored] == [ScaledKVCache] * 2
    assert restored[0].scale == cache[0].scale
    assert restored[0].expected_length == 60
    read(growing, tokens[:1, position:], [1, 30, 1], restored, oracle)


def test_a_saved_scale_is_the_same_number(tokens, tmp_path):
    """mlx-lm saves numbers in float32. 512/300 came back as another scale, so keys were rotated."""
    model = attach(tiny_llama(), {"type": "dynamic", "factor": 2}, trained_length=300)
    cache = make_prompt_cache(model, 512)
    model(tokens[:1, :20], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    (first, _) = load_prompt_cache(str(tmp_path / "cache.safetensors"))

    assert first.scale == cache[0].scale == model.scale_at(512)


def test_a_copied_cache_leaves_the_original_alone(growing, tokens):
    """A server deep-copies a cached prefix for every request that shares it."""
    cache, oracle = make_prompt_cache(growing), Oracle(growing)
    position = read(growing, tokens[:1], [20], cache, oracle)
    other, other_oracle = copy.deepcopy(cache), copy.deepcopy(oracle.__dict__)
    read(growing, tokens[1:2], [60, 1], cache, oracle)
    again = Oracle(growing)
    again.__dict__.update(other_oracle, model=growing)

    read(growing, tokens[2:3, position:], [1, 25], other, again)


def batch_of(model, tokens, lengths, plans):
    """Return a batch of rows that were read alone, and their oracles."""
    rows, oracles = [], []
    for row, (length, plan) in enumerate(zip(lengths, plans, strict=True)):
        cache, oracle = make_prompt_cache(model, plan), Oracle(model, plan or 0)
        if length:
            read(model, tokens[row : row + 1], [length], cache, oracle)
        rows.append(cache)
        oracles.append(oracle)
    return rows, oracles


def merge(rows):
    return [layer[0].merge(layer) for layer in zip(*rows, strict=True)]


def decode(model, tokens, batch, oracles, positions, count):
    """Decode a batch token by token, each row against its oracle."""
    for _ in range(count):
        ids = mx.stack([tokens[row, position] for row, position in positions])[:, None]
        logits = model(ids, cache=batch)
        for row, oracle in enumerate(oracles):
            close(logits[row : row + 1], oracle(ids[row : row + 1]))
        for pair in positions:
            pair[1] += 1


def test_rows_of_unequal_length_each_have_their_scale(model, tokens):
    """Merged rows decode as each would alone, over steps that come at different times."""
    rows, oracles = batch_of(model, tokens, [10, 37, 90], [None, 50, None])
    batch = merge(rows)
    if model._planner.constant:
        assert isinstance(batch[0], BatchKVCache)
    else:
        assert isinstance(batch[0], ScaledBatchKVCache)
        assert batch[0].scales == [row[0].scale for row in rows]
    decode(model, tokens, batch, oracles, [[0, 10], [1, 37], [2, 90]], 30)


def test_rows_come_and_go_while_decoding(growing, tokens):
    """filter, extend, extract and merge again: continuous batching."""
    rows, oracles = batch_of(growing, tokens, [10, 37, 90], [None, 50, None])
    positions = [[0, 10], [1, 37], [2, 90]]
    batch = merge(rows)
    decode(growing, tokens, batch, oracles, positions, 5)
    for cache in batch:
        cache.filter([1, 0])
    oracles, positions = [oracles[1], oracles[0]], [positions[1], positions[0]]
    decode(growing, tokens, batch, oracles, positions, 5)

    joining, joining_oracles = batch_of(growing, tokens[3:], [64], [None])
    for cache, other in zip(batch, merge(joining), strict=True):
        cache.extend(other)
    oracles, positions = oracles + joining_oracles, [*positions, [3, 64]]
    decode(growing, tokens, batch, oracles, positions, 10)

    for cache in batch:
        cache.filter(mx.array([2, 1]))
    oracles, positions = oracles[:0:-1], positions[:0:-1]
    decode(growing, tokens, batch, oracles, positions, 4)

    alone = [cache.extract(0) for cache in batch]
    assert isinstance(alone[0], ScaledKVCache)
    row, position = positions[0]
    read(growing, tokens[row : row + 1, position:], [1] * 20 + [16], alone, oracles[0])


def test_a_padded_prefill_gives_each_row_its_own_length(growing, tokens):
    """mlx-lm pads unequal prompts on the right; padding must not raise a row's scale."""
    lengths, plans = [70, 23, 41], [None, None, 60]
    batch = merge([make_prompt_cache(growing, plan) for plan in plans])
    padding = [70 - length for length in lengths]
    for cache in batch:
        cache.prepare(lengths=lengths, right_padding=padding)
    rows = [
        mx.concatenate([tokens[row, :length], mx.zeros(pad, tokens.dtype)])
        for row, (length, pad) in enumerate(zip(lengths, padding, strict=True))
    ]
    oracles = [Oracle(growing, plan or 0) for plan in plans]
    for start, stop in [(0, 30), (30, 60), (60, 70)]:
        logits = growing(mx.stack(rows)[:, start:stop], cache=batch)
        for row, length in enumerate(lengths):
            if start < length:
                part = rows[row][None, start : min(stop, length)]
                close(logits[row : row + 1, : part.shape[1]], oracles[row](part))
    for cache in batch:
        cache.finalize()

    positions = [[row, length] for row, length in enumerate(lengths)]
    decode(growing, tokens, batch, oracles, positions, 30)


def test_empty_rows_can_be_merged_and_extended(growing, tokens):
    """A server merges rows that have read nothing yet with rows that have."""
    rows, oracles = batch_of(growing, tokens, [0, 20], [40, None])
    batch = merge([rows[0]])
    for cache, other in zip(batch, merge([rows[1]]), strict=True):
        cache.extend(other)
    decode(growing, tokens, batch, oracles, [[0, 0], [1, 20]], 20)
    both = merge([make_prompt_cache(growing), make_prompt_cache(growing, 30)])
    assert both[0].expected_lengths == [0, 30]
    assert both[0].scales == [None, None]


def test_a_saved_batch_goes_on_where_it_was(growing, tokens, tmp_path):
    """mlx-lm must be able to save and load a batch."""
    rows, oracles = batch_of(growing, tokens, [10, 37], [None, 50])
    batch = merge(rows)
    save_prompt_cache(str(tmp_path / "batch.safetensors"), batch)
    restored = load_prompt_cache(str(tmp_path / "batch.safetensors"))
    decode(growing, tokens, restored, oracles, [[0, 10], [1, 37]], 20)


def test_padding_on_the_right_needs_lengths(growing):
    """Without lengths, the length of a row and therefore its scale are unknown."""
    (cache, _) = merge([make_prompt_cache(growing), make_prompt_cache(growing)])
    with pytest.raises(ValueError, match="needs lengths"):
        cache.prepare(right_padding=[0, 3])


@pytest.mark.parametrize("name", SCALINGS)
def test_at_a_fixed_scale_caches_are_those_of_mlx_lm(name, tokens):
    """At a fixed scale mlx-lm's caches are enough, and 8-bit keys are as accurate as in them."""
    model = scaled_llama(name, scale=1.0 if name == "none" else 3.0)
    cache, oracle = make_prompt_cache(model), Oracle(model)
    assert [type(c) for c in cache] == [KVCache] * 2
    position = read(model, tokens[:1], [40], cache, oracle)

    quantised = [c.to_quantized(group_size=32, bits=8) for c in cache]
    assert [type(c) for c in quantised] == [QuantizedKVCache] * 2
    assert mean_error(model, tokens[:1, position:80], quantised, oracle) < 0.04


def test_quantised_keys_that_never_move_are_as_good_as_at_a_fixed_scale(tokens):
    """`generate --kv-bits` uses the scale of prompt and answer together, so keys never move."""
    planned, fixed = scaled_llama("clex"), scaled_llama("clex", scale=5.0)
    one = [c.to_quantized(group_size=32, bits=8) for c in make_prompt_cache(planned, 80)]
    two = [c.to_quantized(group_size=32, bits=8) for c in make_prompt_cache(fixed)]
    assert [type(c) for c in one] == [ScaledQuantizedKVCache] * 2
    for start, stop in [(0, 50)] + [(i, i + 1) for i in range(50, 80)]:
        ids = tokens[:1, start:stop]
        close(planned(ids, cache=one), fixed(ids, cache=two), 1e-5)


def test_quantised_keys_that_move_stay_near(growing, tokens, tmp_path, monkeypatch):
    """Stock programs may quantise a growing cache; each rotation costs accuracy."""

    def error():
        cache, oracle = make_prompt_cache(growing), Oracle(growing)
        position = read(growing, tokens[:1], [14], cache, oracle)
        cache = [c.to_quantized(group_size=32, bits=8) for c in cache]
        save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
        return mean_error(growing, tokens[:1, position:80], cache, oracle)

    moved = error()
    assert moved < 0.08
    stay = lambda self, scales, *_: setattr(self, "scale", scales[0])  # noqa: E731
    monkeypatch.setattr(ScaledQuantizedKVCache, "move_to", stay)
    assert error() > 2 * moved, "stale keys would have passed as well"


def test_keys_are_moved_once_a_step_and_not_once_a_token(growing, tokens, monkeypatch):
    """The published code is slow because it rotates all keys at every token."""
    moves = []
    monkeypatch.setattr(
        ScaledKVCache,
        "move_to",
        lambda self, scales, *rest, original=ScaledKVCache.move_to: (
            moves.append(scales) if self.offset else None,
            original(self, scales, *rest),
        ),
    )
    cache = make_prompt_cache(growing)
    scales = []
    for i in range(100):
        growing(tokens[:1, i : i + 1], cache=cache)
        scales.append(cache[0].scale)

    steps = sum(a != b for a, b in itertools.pairwise(scales))
    assert steps >= 1
    assert len(moves) == steps * len(growing.layers)


def test_a_cache_without_a_scale_is_refused(growing, tokens):
    """A stock cache would silently keep keys of an old scale."""
    for cache in (KVCache(), QuantizedKVCache()):
        with pytest.raises(InputError, match=r"make_prompt_cache\(model\)"):
            growing(tokens[:1, :4], cache=[cache, cache])


def test_a_plan_beyond_the_reach_is_refused():
    """Before any token is read, not after an hour of prefill."""
    model = scaled_llama("clex")
    with pytest.raises(InputError, match=r"321 tokens.* reaches 320"):
        make_prompt_cache(model, expected_length=321)
    make_prompt_cache(model, expected_length=320)
