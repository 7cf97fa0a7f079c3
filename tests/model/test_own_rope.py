"""--own-rope: a stretched rope is kept as the base, or a plain one takes its place."""

import mlx.core as mx
import pytest

from mlx_clex.errors import InputError
from mlx_clex.model.own_rope import original_length, own_entry, without_own_rope
from mlx_clex.model.scaled_model import attach

from ..tiny_families import L0, tiny

CLEX = {"type": "clex", "max_factor": 8}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2 * L0}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 6.0, "original_max_position_embeddings": L0}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": L0}
ALPHA = {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}
FACTOR_1 = {"rope_scaling": {"factor": 1.0}}  # DeepSeek-V2's file wants an entry


def logits(model):
    return model(mx.arange(12)[None])


@pytest.mark.parametrize(
    ("name", "entry", "plain"),
    [
        ("llama", LLAMA3, {"rope_scaling": None}),
        ("qwen2", YARN, {"rope_scaling": None}),
        ("deepseek_v2", YARN | MSCALE, FACTOR_1),
        ("deepseek_v3", YARN | MSCALE, {"rope_scaling": None}),
        ("internlm3", DYNAMIC, {"rope_scaling": None}),
        ("hunyuan_v1_dense", ALPHA, {"rope_scaling": None}),
        ("qwen3_moe", YARN, {"rope_scaling": None}),
    ],
)
def test_drop_equals_a_model_that_was_never_stretched(name, entry, plain):
    """DeepSeek's yarn also changes the scale of the attention, which stayed."""
    model = attach(tiny(name, rope_scaling=entry), CLEX, own_rope="drop")
    assert model.trained_length == entry.get("original_max_position_embeddings", L0)
    assert mx.abs(logits(model) - logits(tiny(name, **plain))).max() < 2e-4


def test_drop_that_is_refused_changes_nothing():
    """The ropes were plain already when the scaling was refused."""
    model = tiny("deepseek_v2", rope_scaling=YARN | MSCALE)
    before = logits(model)
    with pytest.raises(InputError, match="log_scale"):
        attach(model, {**CLEX, "log_scale": True}, own_rope="drop")
    assert mx.array_equal(logits(model), before)


def test_keep_again_after_keep():
    """A second scaling starts from the rope that the model brought, not from the first."""
    source = tiny("llama", rope_scaling=LLAMA3)
    before = logits(source)
    attach(source, {"type": "ntk", "factor": 4})
    model = attach(source, {"type": "yarn", "factor": 1}, own_rope="keep")
    assert mx.abs(logits(model) - before).max() < 1e-4
    dropped = attach(model, {"type": "none"}, own_rope="drop", trained_length=64)
    assert mx.abs(logits(dropped) - logits(tiny("llama"))).max() < 1e-4


@pytest.mark.parametrize("choice", ["keep", "drop"])
@pytest.mark.parametrize("entry", [None, {"rope_type": "default"}, {"type": "linear", "factor": 1}])
def test_a_plain_rope_has_no_choice(choice, entry):
    """An option without an effect is a misunderstanding."""
    message = f"--own-rope {choice}: the source has a plain rope"
    with pytest.raises(InputError, match=message):
        attach(tiny("llama", rope_scaling=entry), CLEX, own_rope=choice)


def test_only_keep_and_drop():
    """The error lists what is allowed."""
    with pytest.raises(InputError, match="one of keep, drop, got 'leave'"):
        attach(tiny("llama", rope_scaling=LLAMA3), CLEX, own_rope="leave")


def test_a_rope_that_mlx_lm_ignores_has_the_length_before_stretching():
    """Qwen3-MoE with yarn has a plain rope in mlx-lm, trained at the original length."""
    model = tiny("qwen3_moe", rope_scaling=YARN, max_position_embeddings=8 * L0)
    assert attach(model, CLEX).trained_length == 2 * L0


def test_entries_are_found_where_configs_have_them():
    """Gemma 3 has its settings in text_config, and from transformers 5 on by layer type."""
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    text = {
        "max_position_embeddings": 131_072,
        "rope_parameters": {"sliding_attention": sliding, "full_attention": full},
    }
    assert own_entry(text) == full
    assert own_entry({"text_config": text}) == full
    assert original_length({"text_config": text}) == 16_384
    plain = without_own_rope({"text_config": text, "vocab_size": 5})
    assert own_entry(plain) is None
    assert plain["vocab_size"] == 5
    assert plain["text_config"]["max_position_embeddings"] == 16_384
    full = plain["text_config"]["rope_parameters"]["full_attention"]
    assert full == {"rope_type": "default", "rope_theta": 1e6}


def test_a_config_without_the_length_before_stretching():
    """There is nothing to start from, and no guess."""
    config = {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}
    with pytest.raises(InputError, match="no original_max_position_embeddings"):
        without_own_rope(config)
