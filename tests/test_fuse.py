"""Adapters and scaling are merged into one checkpoint."""

import json
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx_clex.convert import convert
from mlx_lm.utils import load as stock_load
from mlx_lm.utils import save_config, save_model

from mlx_clex import fuse, generate, load, lora

from .conftest import GOLDEN, as_peft, random_adapters, stock_folder
from .model.test_gpt_neox import published

IDS = mx.arange(3, 60)[None]


@pytest.fixture(autouse=True)
def _eager(tmp_path, monkeypatch):
    """Disable compiling, which takes seconds per kernel on a CPU."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mx.disable_compile()
    yield
    mx.enable_compile()


def train(model, tmp_path, *more):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick brown fox runs away . " * 60)
    argv = [
        *("--train", "--model", str(model), "--data", str(tmp_path / "texts")),
        *("--adapter-path", str(tmp_path / "adapters"), "--iters", "3", "--batch-size", "1"),
        *("--max-seq-length", "32", "--learning-rate", "1e-3", *more),
    ]
    assert lora.main(argv) == 0
    return tmp_path / "adapters"


def merge(model, adapters, target, *more):
    argv = ["--model", str(model), "--adapter-path", str(adapters), "--save-path", str(target)]
    argv += more
    return fuse.main(argv)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a base model in float32, so that rounding hides no mistake."""
    target = tmp_path_factory.mktemp("base") / "clex_llama"
    return convert(GOLDEN / "clex_llama", target, dtype="float32")


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "scaling"])
def test_the_fused_model_answers_as_the_adapters_do(kind, base, tmp_path):
    """Scaling, norms and embeddings included; no trace of the adapters is left."""
    adapters = train(base, tmp_path, "--fine-tune-type", kind, "--train-norms-and-embeddings")
    assert merge(base, adapters, tmp_path / "fused") == 0
    wanted = load(base, adapter_path=adapters)[0](IDS)
    assert mx.abs(load(base)[0](IDS) - wanted).max().item() > 1e-3
    ours = load(tmp_path / "fused")[0](IDS)
    assert mx.abs(ours - wanted).max().item() < 1e-3
    assert not list(tmp_path.glob("*incomplete*"))


KILL_WHILE_WRITING = """
import os, signal, sys
from mlx_clex import fuse; from mlx_clex.convert import pipeline
pipeline.write_weights = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
fuse.main(sys.argv[1:])
"""


def test_the_next_run_deletes_what_a_killed_one_left(base, tmp_path, capsys):
    """Each kill left the merged model in a hidden folder that nothing found again."""
    adapters = random_adapters(base, tmp_path / "adapters", 1)
    target = tmp_path / "out" / "fused"
    argv = ["--model", str(base), "--adapter-path", str(adapters), "--save-path", str(target)]
    done = subprocess.run([sys.executable, "-c", KILL_WHILE_WRITING, *argv], check=False)
    assert done.returncode == -signal.SIGKILL
    left = {path.name.rpartition("-")[0] for path in target.parent.iterdir()}
    assert left == {"fused.incomplete", "fused.merged.incomplete"}
    assert merge(base, adapters, target) == 0
    assert [path.name for path in target.parent.iterdir()] == ["fused"]
    told = capsys.readouterr().err
    assert told.count("which a killed command left") == 2


def test_adapters_of_peft_are_fused(base, tmp_path):
    """They ended with "cannot be loaded: num_layers"."""
    adapters = random_adapters(base, tmp_path / "ours", 1)
    wanted = load(base, adapter_path=adapters)[0](IDS)
    assert merge(base, as_peft(adapters, tmp_path / "peft"), tmp_path / "fused") == 0
    assert mx.abs(load(tmp_path / "fused")[0](IDS) - wanted).max().item() < 1e-3


def test_a_quantised_base_stays_quantised_or_not(base, tmp_path):
    """Requantised by default; --dequantize writes plain weights."""
    base = convert(base, tmp_path / "q8", quantize=True, q_bits=8, q_group_size=32)
    adapters = train(base, tmp_path)
    wanted = load(base, adapter_path=adapters)[0](IDS)
    for more, quantised in ((), True), (("--dequantize",), False):
        target = tmp_path / f"fused{quantised}"
        assert merge(base, adapters, target, *more) == 0
        config = json.loads((target / "config.json").read_text())
        assert ("quantization" in config) == quantised
        error = mx.abs(load(target)[0](IDS) - wanted).max().item()
        assert error < (0.3 if quantised else 1e-3)


def test_a_scaling_that_only_the_adapters_have(tmp_path):
    """From a stock base, the fused folder runs in mlx-lm; frozen, it runs without mlx_clex."""
    base = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    adapters = train(base, tmp_path, "--scaling", "clex", "--max-factor", "8")
    wanted = load(base, adapter_path=adapters)[0](IDS)
    assert merge(base, adapters, tmp_path / "fused") == 0
    ours, _ = load(tmp_path / "fused")
    assert ours.scaling.config.max_factor == 8
    assert mx.abs(ours(IDS) - wanted).max().item() < 1e-3
    stock, _ = stock_load(
        str(tmp_path / "fused"),
        tokenizer_config={"trust_remote_code": True},
        trust_remote_code=True,
    )
    assert mx.abs(stock(IDS) - wanted).max().item() < 1e-3
    assert merge(base, adapters, tmp_path / "frozen", "--freeze", "4") == 0
    frozen, _ = stock_load(str(tmp_path / "frozen"))
    held = load(base, adapter_path=adapters, scale=4)[0](IDS)
    assert mx.abs(frozen(IDS) - held).max().item() < 1e-3


def test_adapters_of_mlx_lm_alone_are_fused_too(tmp_path):
    """With a plain base and plain adapters, the config has no mlx_clex entry."""
    base = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    adapters = train(base, tmp_path, "--scaling", "none", "--trained-length", "32")
    assert merge(base, adapters, tmp_path / "fused") == 0
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert "model_file" not in config
    assert not config.get("rope_scaling")


def test_bad_input_is_one_line(base, converted, tmp_path, capsys):
    """An existing target, missing adapters, and adapters of another model."""
    (tmp_path / "there").mkdir()
    assert merge(base, tmp_path, tmp_path / "there") == 2
    assert "exists already" in capsys.readouterr().err
    assert merge(base, tmp_path / "nowhere", tmp_path / "fused") == 2
    assert "adapter_config.json" in capsys.readouterr().err
    save_config({"fine_tune_type": "full", "num_layers": 2}, tmp_path / "adapter_config.json")
    save_model(tmp_path, load(converted("clex_phi"))[0])
    (tmp_path / "model.safetensors").rename(tmp_path / "adapters.safetensors")
    assert merge(base, tmp_path, tmp_path / "fused") == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()


def test_gpt_neox_is_tuned_fused_and_generates(tmp_path, capsys):
    """GPT-NeoX, a family in the CLEX paper, from the published form to an answer."""
    published(tmp_path / "published", vocabulary=512)
    for file in (GOLDEN / "clex_llama").glob("*token*"):
        shutil.copy(file, tmp_path / "published")
    scaling = {"type": "clex", "max_factor": 8}
    base = convert(tmp_path / "published", tmp_path / "base", scaling=scaling, dtype="float32")
    adapters = train(base, tmp_path)
    assert merge(base, adapters, tmp_path / "fused") == 0
    wanted = load(base, adapter_path=adapters)[0](IDS)
    assert mx.abs(load(base)[0](IDS) - wanted).max().item() > 1e-3
    assert mx.abs(load(tmp_path / "fused")[0](IDS) - wanted).max().item() < 1e-3

    capsys.readouterr()
    argv = ["--model", str(tmp_path / "fused"), "--prompt", "the quick brown", "-m", "40"]
    assert generate.main(argv) == 0
    assert "Scale: " in capsys.readouterr().out


def test_what_cannot_be_frozen_is_told_before_the_merge(tmp_path, capsys, monkeypatch):
    """The merged model was written in full first."""
    monkeypatch.setattr(fuse, "merge", lambda *args, **options: pytest.fail("merged"))
    base = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    adapters = train(base, tmp_path, "--scaling", "none", "--trained-length", "32")
    assert merge(base, adapters, tmp_path / "fused", "--freeze", "1000") == 2
    assert "scale" in capsys.readouterr().err
