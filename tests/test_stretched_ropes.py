"""Stretched ropes of published checkpoints give transformers' logits, with a scaling too."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_clex.convert import convert
from transformers import AutoModelForCausalLM

from mlx_clex import load
from mlx_clex.errors import InputError

from .test_absent_keys import IDS, write

ORIGINAL, LENGTH = 128, 1024  # tokens, before and after stretching
AT_THE_TOP = {"original_max_position_embeddings": ORIGINAL}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [4.0] * 8, "long_factor": [4.0] * 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, **BANDS, **AT_THE_TOP}
YARN = {"type": "yarn", "factor": 8.0, **AT_THE_TOP}
ROPES = {
    "llama3": ("llama", {"rope_scaling": LLAMA3}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope", **FACTORS}, **AT_THE_TOP}),
    "yarn": ("qwen2", {"rope_scaling": YARN}),
    "finetuned": ("llama", {"rope_scaling": YARN | {"finetuned": True}}),
    "mscale": ("llama", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "mscale 0.7": ("mistral", {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}}),
}
IGNORED = {"attention_factor": {"attention_factor": 1.0}, "truncate": {"truncate": False}}


def logits(folder):
    return np.array(load(folder)[0](mx.array(IDS)))


def source(folder, family, changes):
    """Write a checkpoint with a stretched rope; return transformers' logits."""
    config = write(family, folder) | {"rope_theta": 1.5e5, "max_position_embeddings": LENGTH}
    (folder / "config.json").write_text(json.dumps(config | changes))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ROPES)
def test_a_stretched_rope_is_a_base(name, tmp_path):
    """`convert --scaling` dropped the rope: a Llama 3.1 was off by 5 in a logit at scale 1."""
    theirs = source(tmp_path / "source", *ROPES[name])
    assert np.abs(logits(tmp_path / "source") - theirs).max() < 1e-3
    for choice, length in (("keep", LENGTH), ("drop", ORIGINAL)):
        target = tmp_path / choice
        convert(tmp_path / "source", target, scaling={"type": "clex"}, own_rope=choice)
        assert json.loads((target / "config.json").read_text())["max_position_embeddings"] == length
        same = np.abs(logits(target) - theirs).max() < 1e-3
        assert same == (choice == "keep"), choice


@pytest.mark.parametrize("key", IGNORED)
def test_a_key_that_mlx_lm_ignores_is_told_and_left_to_it(key, tmp_path, capsys):
    """transformers reads `attention_factor` and `truncate`, so the answers differ from it."""
    theirs = source(tmp_path / "yarn", "llama", {"rope_scaling": YARN | IGNORED[key]})
    plain = source(tmp_path / "plain", "llama", {"rope_scaling": YARN})
    ours = logits(tmp_path / "yarn")
    assert f"mlx-lm ignores {key} of this model's rope_scaling" in capsys.readouterr().err
    assert np.abs(ours - plain).max() < 1e-3 < np.abs(ours - theirs).max()


def test_the_gain_of_a_longrope_stays(tmp_path):
    """It follows the length in config.json, which --trained-length replaced."""
    source(tmp_path / "source", *ROPES["longrope"])
    with pytest.raises(InputError, match="follows its length, 1024 tokens"):
        convert(tmp_path / "source", tmp_path / "a", scaling={"type": "ntk"}, trained_length=512)
