"""Cached prefixes are reused only where a new prompt has their scale and gain."""

import mlx.core as mx
import pytest
from mlx_lm.generate import stream_generate

from mlx_clex import bundled, load
from mlx_clex.model.plans import plan_of
from mlx_clex.model.scaled_model import make_prompt_cache
from mlx_clex.serving.prompt_caches import PlannedPromptCache

from ..conftest import scaled_llama


class Provider:
    loads = 0

    def __init__(self, *models):
        self.models = list(models)


@pytest.mark.parametrize(
    ("name", "gains", "read", "kept"),
    [
        ("clex", {}, 60, True),
        ("clex", {}, 70, False),  # past the plan, at another scale
        ("clex", {"log_scale": True}, 60, False),  # the gain of one length serves no other
        ("clex", {"log_gain": True}, 60, True),
        ("clex", {"log_gain": True}, 70, False),
        ("gene", {}, 60, True),
        ("gene", {"log_scale": True}, 62, True),  # its gain belongs to positions
        ("linear", {}, 300, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*past the.*that this model's scaling")
def test_only_prefixes_of_one_plan_are_kept(name, gains, read, kept, tokens):
    """A cache of mixed scales answers like no single pass over any prompt."""
    model = scaled_llama(name, **gains)
    cache = make_prompt_cache(model, 61)
    model(tokens[:1, :60], cache=cache)
    for i in range(60, read):
        model(tokens[:1, i : i + 1], cache=cache)
    assert "log_scale" in gains or (plan_of(model, cache) is not None) == kept

    prompts = PlannedPromptCache(Provider(model), 10)
    ids = tokens[0, :read].tolist()
    prompts.insert_cache("m", ids, cache)
    reused, rest = prompts.fetch_nearest_cache("m", [*ids, 1])
    assert len(prompts) == kept
    assert rest == ([1] if kept else [*ids, 1])
    assert mx.array(reused[0].offset).item() == (read if rest == [1] else 0)


def answer(prompts, models, tokenizer, ids, count, **options):
    """(tokens of a greedy answer, cached tokens), served as mlx-lm's server serves one by one."""
    cache, rest = prompts.fetch_nearest_cache("m", ids)
    model, *draft = models
    parts = stream_generate(
        model,
        tokenizer,
        rest,
        max_tokens=count,
        prompt_cache=cache,
        draft_model=draft[0] if draft else None,
        **options,
    )
    tokens = [part.token for part in parts]
    prompts.insert_cache("m", ids + tokens, cache)
    return tokens, len(ids) - len(rest)


@pytest.mark.parametrize("scale", [4.0, None])
def test_caches_that_drafting_leaves_short_are_not_kept(scale):
    """With a fixed scale they were kept: the next request skipped a token."""
    model, tokenizer = load(bundled.MODELS["gene"], scale=scale)
    models = [model, load(bundled.MODELS["base"])[0]]
    ids = tokenizer.encode(bundled.OPENING + " in those days, that the king")
    kept = 0
    for count in range(4, 12):
        prompts = PlannedPromptCache(Provider(*models), 10)
        prompts.room = 20  # as the server plans for drafts
        first, _ = answer(prompts, models, tokenizer, ids, count)
        going_on = [*ids, *first, *tokenizer.encode(" said", add_special_tokens=False)]
        second, cached = answer(prompts, models, tokenizer, going_on, 8)
        fresh = PlannedPromptCache(Provider(*models), 10)
        assert second == answer(fresh, models, tokenizer, going_on, 8)[0], f"{count} tokens"
        kept += cached > 0
    assert kept < 8


def test_layers_that_share_keys_do_not_prevent_reuse(tokens):
    """Their caches stay empty, at offset 0."""
    model = scaled_llama("linear")
    cache = make_prompt_cache(model)
    model(tokens[:1, :20], cache=cache)
    ids = tokens[0, :20].tolist()
    for shared, kept in ((True, 1), (False, 0)):
        prompts = PlannedPromptCache(Provider(model), 10)
        last = make_prompt_cache(model)[-1]
        if not shared:
            last.update_and_fetch(*(part[..., :19, :] for part in cache[-1].state[:2]))
        prompts.insert_cache("m", ids, [*cache[:-1], last])
        assert len(prompts) == kept


@pytest.mark.parametrize(("start", "reused"), [(0, False), (16, False), (64, True)])
def test_a_prompt_with_quantised_keys_is_read_anew(start, reused, tokens):
    """Which keys were quantised when a token was read depended on what was served before."""
    model = scaled_llama("linear")
    _, tokenizer = load(bundled.MODELS["base"])
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    options["prefill_step_size"] = 8
    prompts = PlannedPromptCache(Provider(model), 10, quantised_from=start)
    ids = tokens[0, :12].tolist()
    first, _ = answer(prompts, [model], tokenizer, ids, 2, **options)
    going_on = [*ids, *first, *tokens[0, 12:24].tolist()]
    second, cached = answer(prompts, [model], tokenizer, going_on, 8, **options)
    fresh = PlannedPromptCache(Provider(model), 10, quantised_from=start)
    assert second == answer(fresh, [model], tokenizer, going_on, 8, **options)[0]
    assert (cached > 0) == reused


def test_quantised_caches_are_not_kept(tokens):
    """A shorter prompt could go on from them, and would read quantised keys."""
    model = scaled_llama("linear")
    _, tokenizer = load(bundled.MODELS["base"])
    prompts = PlannedPromptCache(Provider(model), 10, quantised_from=16)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 16}
    answer(prompts, [model], tokenizer, tokens[0, :12].tolist(), 8, **options)
    assert len(prompts) == 0


def test_caches_beyond_the_bytes_allowed_are_not_kept(tokens):
    """--prompt-cache-bytes had no effect on requests that are served one by one."""
    model = scaled_llama("linear")
    for most, kept in ((None, 1), (1000, 0)):
        prompts = PlannedPromptCache(Provider(model), 10, max_bytes=most)
        cache = make_prompt_cache(model)
        model(tokens[:1, :20], cache=cache)
        prompts.insert_cache("m", tokens[0, :20].tolist(), cache)
        assert len(prompts) == kept
