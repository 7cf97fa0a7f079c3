"""load and convert give transformers' logits where config.json leaves keys out."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_clex.convert import convert
from mlx_lm.utils import save_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mlx_clex import load

from . import tiny_families
from .conftest import GOLDEN

BOUND = 1e-3  # of the largest logit; mlx-lm's gelu of Gemma and StarCoder2 is the exact one
IDS = np.random.default_rng(0).integers(3, 500, (1, 40))
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 256},  # mlx-lm's GPT-NeoX has no other ratio
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **{"num_hidden_layers": 2, "vocab_size": 512, "head_dim": 16, "pad_token_id": 0},
}
# Keys with a default in transformers' class; a family may lack some.
ABSENT = {
    *("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor", "rotary_pct"),
    *("rotary_emb_base", "rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    *("head_dim", "num_key_value_heads", "tie_word_embeddings", "logit_scale", "hidden_act"),
    *("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "use_qk_norm", "qk_layernorm"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"),
    *("use_parallel_residual", "norm_topk_prob", "sliding_window"),
}
WINDOWS = {"layer_types", "use_sliding_window", "max_window_layers"}
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "cohere", "starcoder2"),
    *("olmo2", "stablelm", "granite", "phi", "gpt_neox", "nemotron", "ernie4_5"),
)
# Families whose tiny models need more settings than `SIZES`.
MORE = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"shared_expert_intermediate_size": 32},
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window": 8, "max_position_embeddings": 64},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 8},
    "glm4": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_dim": 64},
}
HEADS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "starcoder2", "ernie4_5")


def write(family, folder, **given):
    """Write a random model of transformers; return its config without the keys in question.

    Args:
        family: its model_type.
        folder: the folder to write.
        given: settings that stay in the config.
    """
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key not in ABSENT}
    if getattr(CONFIG_MAPPING[family](**sizes), "num_key_value_heads", 4) != 4:
        given |= {"num_key_value_heads": 4}  # the default is more heads than there are queries
    settings = CONFIG_MAPPING[family](**{**sizes, **given})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 0.1 if weight.ndim < 2 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape) * spread + (weight.ndim < 2 and "norm" in name))
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key in given or key not in ABSENT}


def copy_tokenizer(folder):
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "clex_llama" / file, folder)


def check(folder, target, config):
    """Hold load, before and after convert, to transformers."""
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).logits.numpy()
    convert(folder, target)
    for way in (folder, target):
        ours = np.array(load(way)[0](mx.array(IDS)))
        assert np.abs(ours - theirs).max() < BOUND * max(1.0, np.abs(theirs).max()), way.name


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_they_mean_in_transformers(family, tmp_path):
    """rope_theta absent: qwen2 was off by 6.0, starcoder2 by 2.8, and qwen3 was refused."""
    check(tmp_path / "source", tmp_path / "target", write(family, tmp_path / "source"))


@pytest.mark.parametrize("family", MORE)
def test_absent_keys_of_experts_hybrids_and_windows(family, tmp_path):
    """Their config classes have defaults of their own, such as a period of windowed layers."""
    config = write(family, tmp_path / "source", **MORE[family])
    check(tmp_path / "source", tmp_path / "target", config)


ONE_BY_ONE = ("llama", "qwen3", "gemma3_text", "phi3")


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_each_absent_key_alone(family, tmp_path):
    """A default may be read right only where other keys are absent as well."""
    folder = tmp_path / "source"
    write(family, folder, **MORE.get(family, {}))
    whole = json.loads((folder / "config.json").read_text())
    keys = sorted(whole.keys() & (ABSENT | WINDOWS))
    assert "rope_parameters" in keys
    for key in keys:
        config = {name: value for name, value in whole.items() if name != key}
        size = getattr(CONFIG_MAPPING[family](**config), key)
        if key in ("head_dim", "num_key_value_heads") and size != whole[key]:
            continue  # the tensors of this tiny model have other shapes than the default
        try:
            check(folder, tmp_path / key, config)
        except AssertionError as error:
            raise AssertionError(f"{key} absent: {error}") from error


@pytest.mark.parametrize("tied", [None, True])
@pytest.mark.parametrize("family", HEADS)
def test_the_head_is_the_one_of_transformers(family, tied, tmp_path):
    """`load` was off by 7.0 where the key was absent, and both where it was wrong."""
    config = write(family, tmp_path / "source", tie_word_embeddings=False)
    config.pop("tie_word_embeddings")
    given = {} if tied is None else {"tie_word_embeddings": tied}
    check(tmp_path / "source", tmp_path / "target", config | given)


@pytest.mark.parametrize("tied", [None, True])
@pytest.mark.parametrize("family", ["internlm2", "exaone"])
def test_the_head_may_have_any_name(family, tied, tmp_path):
    """`convert` looked for lm_head alone, so it refused InternLM 2, whose head is `output`."""
    source, target = tmp_path / "source", tmp_path / "target"
    model = tiny_families.tiny(family, vocab_size=512, tie_word_embeddings=False)
    save_model(source, model)
    config = tiny_families.config(family, vocab_size=512, max_position_embeddings=64)
    if tied is not None:
        config["tie_word_embeddings"] = tied
    (source / "config.json").write_text(json.dumps(config))
    copy_tokenizer(source)
    convert(source, target)
    for way in (source, target):
        assert mx.array_equal(load(way)[0](mx.array(IDS)), model(mx.array(IDS))), way.name
