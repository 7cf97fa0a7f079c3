"""Quantised checkpoints, as `mlx_lm.convert -q` writes them, through every leg of a user's way."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from mlx_clex.convert import convert
from mlx_lm.utils import load_model

from mlx_clex import fuse, load, lora
from mlx_clex.diagnosis.model_report import report

from .published_configs import VOCABULARY, tiny_folder

IDS = mx.random.randint(3, VOCABULARY, (1, 16), key=mx.random.key(0))
CASES = [
    ("llama-2-7b", 4),
    ("llama-3.1-8b", 4),  # a llama3 rope
    ("mixtral-8x7b", 4),  # experts
    ("llama-3.2-1b", 8),  # tied embeddings and a llama3 rope
]


@pytest.fixture(autouse=True)
def _no_compiler():
    """MLX's CPU kernels take a C++ compiler; these models are too small for that."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def bits_of(model):
    """Return the bits of the quantised layers of a model."""
    return {layer.bits for _, layer in model.named_modules() if hasattr(layer, "bits")}


def error(model, other):
    return mx.abs(model(IDS) - other(IDS)).max().item()


def call(command, *argv):
    assert command.main([str(arg) for arg in argv]) == 0


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_quantised_checkpoint_goes_every_way(name, bits, tmp_path):
    """The table of configurations leaves quantised weights out, and most users have them."""
    source = tmp_path / "quantised"
    options = {"quantize": True, "q_bits": bits, "q_group_size": 32}
    mlx_lm.convert(str(tiny_folder(name, tmp_path / "tiny")), str(source), **options)
    config = json.loads((source / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    stock, _ = load_model(source)
    assert error(load(source)[0], stock) == 0

    made = convert(source, tmp_path / "made", scaling={"type": "clex"})
    written = json.loads((made / "config.json").read_text())
    assert written["quantization"] == config["quantization"]
    model, tokenizer = load(made, scale=1.0)
    assert bits_of(model) == bits_of(stock) == {bits}
    assert error(model, stock) < 1e-4
    model, tokenizer = load(made)
    plain = mlx_lm.generate(stock, tokenizer, "text of any kind", max_tokens=4)
    assert mlx_lm.generate(model, tokenizer, "text of any kind", max_tokens=4) == plain
    rows = report(str(source))
    assert "problem" not in dict(rows), rows

    texts, adapters = tmp_path / "texts", tmp_path / "adapters"
    texts.mkdir()
    (texts / "a.txt").write_text("the quick brown fox runs away . " * 20)
    steps = "--train --scaling clex --iters 2 --batch-size 1 --max-seq-length 16 --val-batches 0"
    where = ("--model", source, "--adapter-path", adapters)
    call(lora, *steps.split(), "--learning-rate", 1e-3, *where, "--data", texts)
    call(fuse, *where, "--save-path", tmp_path / "fused", "--dequantize")
    call(fuse, *where, "--save-path", tmp_path / "again")
    tuned, _ = load(source, adapter_path=adapters)
    assert error(tuned, stock) > 1e-4, "training changed nothing"
    fused, _ = load(tmp_path / "fused")
    assert error(fused, tuned) < 1e-3
    assert not bits_of(fused)
    again, _ = load(tmp_path / "again")
    assert bits_of(again) == {bits}
    # The merged weights are rounded to `bits` again, which moves less than training moved.
    assert error(again, tuned) < error(tuned, stock) / 4
