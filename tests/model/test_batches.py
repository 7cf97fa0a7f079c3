"""mlx-lm's own batched generation on a scaled model: each row at its own scale."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step

from mlx_clex.errors import InputError
from mlx_clex.scaling import SCALINGS

from ..conftest import scaled_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*past the.*that this model's scaling")

COUNT = 40  # tokens generated for each prompt
MODELS = [(name, False) for name in SCALINGS] + [("clex", True), ("gene", True)]


def prompts_of(lengths):
    draw = np.random.default_rng(0)
    return [draw.integers(0, 64, length).tolist() for length in lengths]


def batched(model, prompts, size):
    """Return greedy tokens of each prompt, `size` rows at a time; new rows join when others end."""
    generator = BatchGenerator(
        model,
        max_tokens=COUNT,
        prefill_step_size=32,
        prefill_batch_size=size,
        completion_batch_size=size,
    )
    rows = {uid: [] for uid in generator.insert(prompts)}
    while len(responses := generator.next_generated()) > 0:
        for response in responses:
            rows[response.uid].append(response.token)
    generator.close()
    return list(rows.values())


@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_batch_ends_at_a_hard_reach(scale):
    """At a fixed scale a batch ran past it, because its lengths are on the device."""
    model = scaled_llama("clex", scale=scale)
    reach = 20 * 16
    short, long = prompts_of([reach - COUNT - 100, reach - COUNT])
    assert [len(tokens) for tokens in batched(model, [short, long], 2)] == [COUNT, COUNT]
    with pytest.raises(InputError, match=f"{reach + 1} tokens, and this model reaches {reach}"):
        batched(model, [short, [*long, 1]], 2)


@pytest.mark.parametrize(("name", "log_scale"), MODELS)
@pytest.mark.parametrize("size", [5, 2])
def test_every_row_gets_the_tokens_it_would_get_alone(name, log_scale, size):
    """Prompts of 5 to 90 tokens at a trained length of 16, over many steps of the scale."""
    model = scaled_llama(name, log_scale=log_scale)
    prompts = prompts_of([5, 40, 17, 90, 16])
    together = batched(model, prompts, size)

    for prompt, tokens in zip(prompts, together, strict=True):
        options = {"max_tokens": COUNT, "prefill_step_size": 32}
        alone = [int(token) for token, _ in generate_step(mx.array(prompt), model, **options)]
        assert len(tokens) == COUNT
        assert tokens == alone, f"prompt of {len(prompt)} tokens"
