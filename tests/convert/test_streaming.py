"""The converter needs little memory and never leaves a partial folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_clex.convert import convert
from mlx_clex.convert.pipeline import Source
from mlx_clex.convert.resolve import find
from mlx_clex.convert.write import output

from ..checkpoints import read_config, read_tensors
from ..conftest import GOLDEN


def test_shards_hold_every_tensor_once(tmp_path):
    """Large models are written in several files with an index."""
    tensors = {f"t{i}": mx.full((10, 10), i, dtype=mx.float32) for i in range(7)}
    output.write_weights(
        tmp_path, dict(tensors), {}, shard_bytes=900, file_format="mlx", advance=lambda _: None
    )

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    read = read_tensors(tmp_path)
    assert read.keys() == tensors.keys()
    assert all(mx.array_equal(read[name], tensors[name]) for name in tensors)


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C in the middle of a shard."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_clex.convert.write.output.finite_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(GOLDEN / "clex_llama", tmp_path / "new" / "out")

    assert list(tmp_path.iterdir()) == []


KILL_WHILE_WRITING = """
import os, signal, sys
from mlx_clex.convert import convert; from mlx_clex.convert.write import output
output.finite_bytes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2])
"""


def test_a_killed_conversion_leaves_nothing_that_looks_finished(tmp_path):
    """Nothing can clean up after kill -9, so the remaining folder must not look finished."""
    done = subprocess.run(
        [sys.executable, "-c", KILL_WHILE_WRITING, GOLDEN / "clex_phi", tmp_path / "out"],
        capture_output=True,
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.incomplete-")
    assert not (left / "config.json").exists()
    convert(GOLDEN / "clex_phi", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


MEASURE = """
import json, resource, sys, threading, time
from mlx_clex.convert import convert
import mlx_lm.utils, torch, transformers, tokenizers

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

peak = start = resident()
def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
print((peak - start) / 1e6)
"""


@pytest.fixture(params=["safetensors", "bin"])
def large(request, tmp_path):
    """A 240 MB checkpoint in shards of 80 MB."""
    folder = tmp_path / request.param
    folder.mkdir()
    config = read_config(GOLDEN / "clex_llama")
    config |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 8, "num_hidden_layers": 9, "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (1024, 1024)}
    shapes |= {"self_attn.v_proj": (1024, 1024), "self_attn.o_proj": (1024, 1024)}
    shapes |= {"mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024)}
    shapes |= {"mlp.down_proj": (1024, 3072), "input_layernorm": (1024,)}
    shapes |= {"post_attention_layernorm": (1024,)}
    for shard in range(3):
        names = {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(3 * shard, 3 * shard + 3)
            for name, shape in shapes.items()
        }
        if shard == 0:
            names |= {"model.embed_tokens.weight": (512, 1024), "lm_head.weight": (512, 1024)}
            names |= {"model.norm.weight": (1024,)}
            names |= {"model.clex_layer.proj_func.ode_up_proj": (64, 128)}
            names |= {"model.clex_layer.proj_func.ode_down_proj": (128, 64)}
        state = {
            name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in names.items()
        }
        if request.param == "bin":
            torch.save(state, folder / f"pytorch_model-{shard + 1:05d}-of-00003.bin")
        else:
            from safetensors.torch import save_file

            save_file(state, folder / f"model-{shard + 1:05d}-of-00003.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory on Linux")
def test_memory_is_that_of_a_shard_and_not_of_the_model(large, tmp_path):
    """A 14 GB checkpoint must convert on a Mac with 16 GB."""
    options = json.dumps({"quantize": large.name == "safetensors"})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, large, tmp_path / "out", options],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    used = float(done.stdout.split()[-1])
    shard = max(file.stat().st_size for file in large.iterdir()) / 1e6
    assert used <= 1.5 * shard + 100, f"{used:.0f} MB for shards of {shard:.0f} MB"


def test_headers_are_read_without_data():
    """A dry run of 90 GB must not read 90 GB."""
    source = Source(find(GOLDEN / "clex_llama_gqa_log_scale"))

    weights = source.weights()

    assert weights["model.norm.weight"].shape == (64,)
    assert np.isclose(sum(v.nbytes for v in weights.values()), 279_456, rtol=0.02)
