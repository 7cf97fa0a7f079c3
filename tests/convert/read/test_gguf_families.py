"""A .gguf file of each architecture gives llama.cpp's own logits."""

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from mlx_clex.convert import convert
from mlx_clex.convert.read.gguf_families import FAMILIES
from mlx_lm.utils import _get_classes

import mlx_clex
from mlx_clex.errors import InputError

from ..freeze.test_gguf_export import LlamaCpp, largest_difference
from .test_gguf_file import add_tokenizer, permute

WIDTH, HEADS, KEY_HEADS, HEAD_DIM, LAYERS, INNER, VOCABULARY = 64, 4, 2, 32, 6, 96, 320
THETA = 500_000.0


def divisors(factor: float = 8.0) -> np.ndarray:
    """Llama 3.1's, pair by pair as transformers' loop has it."""
    found = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * THETA ** (2 * pair / HEAD_DIM)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def write_file(path: Path, architecture: str, rope: np.ndarray | None = None) -> None:
    """Write a random model as llama.cpp stores it."""
    family = FAMILIES[architecture]
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM if architecture != "qwen2" else WIDTH // HEADS,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_theta": THETA,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "sliding_window": 24,
    }
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config | family.constants(config)))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(THETA)
    if architecture == "gemma3":
        writer.add_sliding_window(24)
    add_tokenizer(writer, VOCABULARY - 260)
    rng = np.random.default_rng(0)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), LAYERS
    )
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        if name.startswith("lm_head"):
            continue  # Gemma's model has one until its weights are loaded
        stored: np.ndarray = rng.standard_normal(array.shape).astype(np.float32) / 8
        if "norm" in name:
            stored = 1 + stored
        elif family.paired and ("q_proj" in name or "k_proj" in name):
            stored = permute(stored, HEADS if "q_proj" in name else KEY_HEADS)
        theirs = names.get_name(name, (".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, stored)
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [*((name, None) for name in FAMILIES), ("llama", divisors())],
    ids=[*FAMILIES, "llama-3"],
)
def test_the_logits_are_those_of_llama_cpp(tmp_path, architecture, rope):
    """Gemma 3 was refused, and so was every Llama 3, for its rope_freqs.weight."""
    write_file(tmp_path / "model.gguf", architecture, rope)
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="float32")
    model, _ = mlx_clex.load(tmp_path / "out")
    theirs = LlamaCpp(tmp_path / "model.gguf")
    # llama.cpp looks up Gemma's GELU in a table of float16.
    bound = 3e-3 if architecture == "gemma3" else 2e-4
    for length in (16, 120):  # below and beyond Gemma's sliding window
        assert largest_difference(model, theirs, length) < bound


def test_gemma_3_answers_as_transformers_does(tmp_path):
    """llama.cpp's table of GELU hides errors below 1e-3."""
    write_file(tmp_path / "model.gguf", "gemma3")
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="float32")
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, 120))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    found = np.array(mlx_clex.load(tmp_path / "out")[0](mx.array(ids)))
    assert np.abs(found - expected).max() < 1e-4


def test_a_scaling_starts_from_the_frequencies_of_llama_3(tmp_path):
    """At scale 1 the model must equal the file, whatever rope the file has."""
    write_file(tmp_path / "model.gguf", "llama", divisors())
    convert(tmp_path / "model.gguf", tmp_path / "plain", dtype="float32")
    convert(tmp_path / "model.gguf", tmp_path / "clex", dtype="float32", scaling={"type": "clex"})
    ids = mx.array([np.random.default_rng(1).integers(0, VOCABULARY, 60).tolist()])
    plain, clex = (mlx_clex.load(tmp_path / name)[0] for name in ("plain", "clex"))
    assert mx.abs(plain(ids) - clex(ids)).max().item() < 1e-5
    assert plain.args.rope_scaling["factor"] == 8


def test_frequencies_of_no_known_rope_are_refused(tmp_path):
    """Their parameters are not in the file, so a config.json could not hold them."""
    write_file(tmp_path / "model.gguf", "llama", np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32))
    with pytest.raises(InputError, match=r"rope_freqs.weight\) that are not those of Llama 3"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
