"""Two processes of mlx.launch give the tokens of one."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_clex.convert import convert
from mlx_lm.models import qwen2
from mlx_lm.utils import save_model

from . import run_generate
from .conftest import GOLDEN

LAUNCH = shutil.which("mlx.launch", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
PROMPT = "The quick brown fox jumps over the lazy dog. " * 3

pytestmark = [
    pytest.mark.skipif(LAUNCH is None, reason="mlx.launch is not installed"),
    pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="mlx has no ring back end"),
]


def launch(*command):
    """Run a command in two processes that find each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # Two ports in a row, below those the system hands out.
        port = 10_000 + free.getsockname()[1] % 20_000
    return subprocess.run(
        [str(LAUNCH), "-n", "2", "-p", str(port), "--", sys.executable, *map(str, command)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Float32 models that mlx-lm can share out, by heads or by layers."""
    top = tmp_path_factory.mktemp("sharded")
    made = {
        name: convert(GOLDEN / name, top / name, dtype="float32")
        for name in ("clex_llama", "clex_llama_gqa_log_scale", "gene_param_llama", "clex_phi")
    }
    mx.random.seed(0)
    args = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=512,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = qwen2.Model(args)
    for layer in model.layers:
        # Sharper attention than fresh weights give, so that a wrong rotation shows.
        layer.self_attn.q_proj.weight *= 4
        layer.self_attn.k_proj.weight *= 4
    save_model(top / "stock", model)
    (top / "stock" / "config.json").write_text(json.dumps(vars(args)))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "clex_llama" / name, top / "stock")
    made["qwen2"] = convert(top / "stock", top / "qwen2", scaling={"type": "clex"})
    return made


def test_two_processes_give_the_tokens_of_one(folders, tmp_path):
    """By heads, gene-param's own included, and by layers; and what cannot be shared says so."""
    runs = [
        (("clex_llama",), ()),
        (("clex_llama",), ("--scale", "5.5")),
        (("clex_llama_gqa_log_scale",), ("--prefill-step-size", "20")),
        (("gene_param_llama",), ()),
        (("qwen2",), ()),
        (("qwen2",), ("--pipeline",)),
        (("qwen2",), ("--pipeline", "--scale", "5")),
    ]
    refused = [
        ("clex_llama", ("--pipeline",), ["pipeline parallel", "leave out --pipeline"]),
        ("clex_phi", (), ["tensor parallel", "phi"]),
        ("clex_llama", ("--adapter-path", "/nowhere"), ["fuse them first"]),
        ("clex_llama", ("--prompt-cache-file", "/nowhere"), ["--prompt-cache-file"]),
    ]
    base = ("--prompt", PROMPT, "-m", "30", "--temp", "0")
    argvs = [["--model", str(folders[name]), *base, *args] for (name,), args in runs]
    sampled = ["--model", str(folders["clex_llama"]), "--prompt", "A", "-m", "30", "--temp", "1.5"]
    argvs.append(sampled)
    argvs += [["--model", str(folders[name]), *base, *args] for name, args, _ in refused]
    (tmp_path / "runs.json").write_text(json.dumps(argvs))

    done = launch(run_generate.__file__, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    (tmp_path / "runs.json").write_text(json.dumps(argvs[: len(runs)]))
    run_generate.main(str(tmp_path))
    alone = json.loads((tmp_path / "rank0.json").read_text())

    for argv, mine, other, one in zip(argvs, first, second, alone, strict=False):
        assert mine[0] == other[0] == one[0] == 0, mine[2] + one[2]
        assert text_of(mine[1]) == text_of(one[1]), argv
        assert other[1] == "", "the second process printed"
    assert first[len(runs)][0] == second[len(runs)][0] == 0, "sampling, with one seed for both"
    for (_, _, words), mine in zip(refused, first[len(runs) + 1 :], strict=True):
        assert mine[0] == 2
        assert all(word in mine[2] for word in words), mine[2]
        assert len(mine[2].strip().splitlines()) == 1


def test_the_command_under_mlx_launch(folders):
    """As it is typed: one process prints, both end."""
    options = ("--model", folders["gene_param_llama"], "--prompt", PROMPT, "-m", "5")
    done = launch("-m", "mlx_clex.generate", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Generation: 5 tokens") == 1


def text_of(out):
    return out.split("=" * 10)[1].strip("\n")
