"""GPT-NeoX, a family in the CLEX paper, equals transformers with replaced frequencies."""

import json

import numpy as np
import pytest
import torch
from mlx_clex.convert import convert
from mlx_lm.utils import load_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mlx_clex import make_prompt_cache

from ..conftest import L0, randomise

CLEX = {"type": "clex", "max_factor": 4}


def published(folder, *, layers=2, rotary=0.5, old=False, vocabulary=64):
    """Save a tiny random checkpoint as transformers does, and return its model."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_act="gelu_new",  # mlx-lm's file computes this one, whatever the config says
        max_position_embeddings=L0,
        initializer_range=0.3,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": rotary,
        },
    )
    model = GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(folder)
    if old:  # as transformers 4 wrote it, and every published checkpoint has it
        path = folder / "config.json"
        entries = json.loads(path.read_text())
        del entries["rope_parameters"]
        path.write_text(json.dumps(entries | {"rotary_pct": rotary, "rotary_emb_base": 500}))
    return model


def converted(folder):
    convert(folder, folder / "mlx", scaling=CLEX)
    model, _ = load_model(folder / "mlx", trust_remote_code=True)
    randomise(model.scaling)
    return model


def logits(theirs, ids, inv_freq):
    """Return the logits of transformers' model with these frequencies."""
    theirs.gpt_neox.rotary_emb.inv_freq = torch.tensor(np.array(inv_freq))
    with torch.no_grad():
        return theirs(torch.tensor(np.array(ids))).logits.numpy()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("rotary", [0.25, 1.0])
def test_a_converted_checkpoint_equals_transformers(tmp_path, tokens, rotary, old):
    """Fused qkv, parallel residual and a partly rotated head, at scales 1 to 4."""
    theirs = published(tmp_path, rotary=rotary, old=old)
    ours = converted(tmp_path)
    assert ours.scaling.dims == 16 * rotary
    assert ours.scaling.trained_length == L0
    for length, scale in [(16, 1), (17, 2), (40, 3), (64, 4)]:
        ids = tokens[:2, :length]
        assert ours.scale_at(length) == scale
        expected = logits(theirs, ids, ours.scaling.inv_freq(scale))
        assert np.abs(np.array(ours(ids)) - expected).max() < 1e-4


def test_decoding_equals_transformers_without_a_cache(tmp_path, tokens):
    """With one layer a key depends on its token only, so a fresh pass gives the exact answer."""
    theirs = published(tmp_path, layers=1)
    ours = converted(tmp_path)
    cache = make_prompt_cache(ours)
    ours(tokens[:1, :10], cache=cache)
    for end in range(11, 40):
        step = ours(tokens[:1, end - 1 : end], cache=cache)
        inv_freq = ours.scaling.inv_freq(ours.scale_at(end))
        expected = logits(theirs, tokens[:1, :end], inv_freq)[:, -1:]
        assert np.abs(np.array(step) - expected).max() < 1e-4, end
