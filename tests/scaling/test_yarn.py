"""Our YaRN reads the optional keys of published entries as transformers does."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_clex.errors import InputError
from mlx_clex.scaling import build_scaling

FACTOR, L0, DIMS, BASE = 4.0, 128, 64, 150_000.0


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"attention_factor": 1.0},
        {"attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"mscale": 0.707, "mscale_all_dim": 1.0},
        {"mscale": 0.7},
        {"mscale_all_dim": 1.0},
        {"truncate": False},
        {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    ],
)
def test_optional_keys_mean_what_they_mean_in_transformers(keys):
    """They were refused as unknown, though gpt-oss and DeepSeek have them."""
    entry = {"rope_type": "yarn", "factor": FACTOR, "rope_theta": BASE, **keys}
    config = LlamaConfig(
        hidden_size=2 * DIMS,
        num_attention_heads=2,
        max_position_embeddings=int(FACTOR * L0),
        rope_parameters=entry | {"original_max_position_embeddings": L0},
    )
    theirs, gain = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))

    ours = build_scaling(
        {"type": "yarn", "factor": FACTOR, **keys}, dims=DIMS, base=BASE, trained_length=L0
    )

    np.testing.assert_allclose(np.array(ours.inv_freq(FACTOR)), theirs.numpy(), rtol=1e-5)
    assert ours.rotary_gain(FACTOR) == pytest.approx(gain)
    entry = ours.stock_entry(FACTOR)
    assert keys.items() <= entry.items()


def test_a_factor_of_nothing_is_refused():
    """It would turn all queries and keys to zero."""
    with pytest.raises(InputError, match="attention_factor must be above 0, got 0"):
        build_scaling(
            {"type": "yarn", "attention_factor": 0}, dims=DIMS, base=BASE, trained_length=L0
        )
