"""A scaling on top of a Llama 3, frozen, gives the same logits in every program."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx_clex.convert import convert
from mlx_clex.convert.freeze import gguf_export
from transformers import AutoModelForCausalLM

import mlx_clex

from ...conftest import CONFIGS, GOLDEN, stock_folder
from .test_gguf_export import SCALE, LlamaCpp, largest_difference

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BOUND = 1e-4  # of a logit; float32 rounding of angles


@pytest.mark.parametrize("name", ["clex", "gene", "yarn"])
def test_a_frozen_llama_3_gives_our_logits_everywhere(name, tmp_path):
    """The kept llama3 frequencies must come out in the words of each program."""
    settings = {"max_position_embeddings": 64, "rope_scaling": LLAMA3}
    source = stock_folder(tmp_path, GOLDEN / "clex_llama", **settings)
    made = convert(source, tmp_path / "made", scaling={"type": name, **CONFIGS[name]})
    frozen = convert(made, tmp_path / "frozen", freeze=SCALE)
    file = convert(made, tmp_path / "gguf", freeze=SCALE, freeze_for="llama.cpp")
    ids = np.random.default_rng(0).integers(259, 512, (1, SCALE * 64 - 4))

    ours, _ = mlx_clex.load(made, scale=SCALE)
    logits = np.array(ours(mx.array(ids)))
    kept, _ = mlx_clex.load(source)
    assert np.abs(np.array(kept(mx.array(ids))) - logits).max() > 100 * BOUND, "nothing to hold"
    stock, _ = mlx_lm.load(str(frozen))
    assert np.abs(np.array(stock(mx.array(ids))) - logits).max() < BOUND
    model = AutoModelForCausalLM.from_pretrained(frozen, dtype=torch.float32)
    with torch.no_grad():
        assert np.abs(model(torch.tensor(ids)).logits.numpy() - logits).max() < BOUND
    llama_cpp = LlamaCpp(file / gguf_export.FILE)
    for length in (16, 60, ids.shape[1]):
        assert largest_difference(stock, llama_cpp, length) < BOUND
