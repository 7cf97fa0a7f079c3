"""Cached prefixes are reused only where a new prompt has their scale and gain."""

import mlx.core as mx
import pytest

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
