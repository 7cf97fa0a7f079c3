"""`plan` says what fits, what to change, and which input it cannot use."""

import json
import re
from pathlib import Path

import pytest

from mlx_clex import plan

from .diagnosis.test_memory import LLAMA_7B


def run(*argv):
    """Run the command and return its status; argparse ends with 2 by itself."""
    try:
        return plan.main(argv)
    except SystemExit as ended:
        return ended.code


@pytest.fixture
def model(tmp_path):
    """A LLaMA 7B with CLEX: its config alone."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return str(tmp_path)


def test_what_fits_three_macs(model, capsys):
    """64k tokens of CLEX-7B in 4 bits: not on 16 GB, with options on 32 GB, as it is on 64 GB."""
    said = {}
    for memory in ("16GB", "32GB", "64GB"):
        options = ("--q-bits", "4", "--context", "65536", "--train", "16384")
        assert run(model, *options, "--memory", memory, "--backend", "metal") == 0
        said[memory] = capsys.readouterr().out
    assert "Metal, 16.00 GB, of which MLX can use 10.67 GB" in said["16GB"]
    assert "Not measured" in said["16GB"]
    assert "Reading: 65,536 tokens do not fit;" in said["16GB"]
    assert "fit with --prefill-step-size 512 --kv-bits 4." in said["32GB"]
    assert "Reading: 65,536 tokens fit as they are." in said["64GB"]
    assert "Training: 16,384 tokens fit with --grad-checkpoint." in said["64GB"]
    assert "Training: 16,384 tokens do not fit;" in said["16GB"]
    # The page has the same figures: its table once said 39.53 GB after `plan` had changed.
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    for name in ("reading 65,536 tokens", "LoRA at 16,384 tokens"):
        (stated,) = re.findall(rf"^\| {name}.*?, ([\d.]+ GB) \|", page, re.MULTILINE)
        assert f"tokens: {stated}" in said["64GB"]
    for words, option in (
        ("longest context as it is", "as asked"),
        ("with `--kv-bits 4` as well", "--prefill-step-size 512 --kv-bits 4"),
        ("with `--grad-checkpoint`", "--grad-checkpoint"),
    ):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {words}")]
        for figure, text in zip(row.split("|")[2:5], said.values(), strict=True):
            assert f"{figure.strip()}  {option}\n" in text


def test_this_machine_and_the_default_context(capsys):
    """Without options: the reach of the model, on this machine."""
    assert run("bundled:clex") == 0
    said = capsys.readouterr().out
    assert "reading 2,048 tokens" in said
    assert "Reading: 2,048 tokens fit as they are." in said


def test_a_length_past_a_soft_reach(capsys):
    """The table ended at the reach, and the advice said that more fits."""
    assert run("bundled:gene", "--context", "3000", "--memory", "32GB") == 0
    said = capsys.readouterr().out
    assert "     3,000  as asked" in said
    assert "Reading: 3,000 tokens fit as they are." in said
    assert run("bundled:gene", "--context", str(10**11), "--memory", "32GB") == 0
    said = capsys.readouterr().out
    asked, most = re.findall(r"Reading: ([\d,]+) tokens do not fit; ([\d,]+) do", said)[0]
    assert int(asked.replace(",", "")) == 10**11
    assert int(most.replace(",", "")) > 100_000


def test_a_picture(model, tmp_path, capsys):
    """Memory against length, for what was planned and for what needs least; the folder is made."""
    path = tmp_path / "new" / "memory.png"
    assert run(model, "--memory", "32GB", "--output", str(path)) == 0
    assert path.stat().st_size > 10_000
    assert "Drew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "big"], "must be a size such as 4GB, got 'big'"),
        (["--memory", "3 apples"], "must be a size such as 4GB"),
        (["--memory", "0"], "--memory is 0 bytes, and must be at least 1MB. Give a unit: 32GB"),
        (["--memory", "32"], "--memory is 32 bytes"),
        (["--context", "0"], "--context must be at least 1, got 0"),
        (["--train", "512", "-1"], "--train must be at least 1, got -1"),
        (["--num-layers", "0"], "--num-layers must be at least 1, got 0"),
        (["--context", "70000"], "--context has 70000 tokens, and this model reaches 65536"),
        (["--train", "512", "70000"], "--train has 70000 tokens, and this model reaches 65536"),
        (["--kv-bits", "7"], "--kv-bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        (["--backend", "vulkan"], "invalid choice: 'vulkan'"),
        (["--output", "memory.gif"], "A picture is a .png or .svg file"),
    ],
)
def test_options_that_cannot_be_used(model, capsys, options, words):
    """One line, and exit status 2."""
    assert run(model, *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_cache_that_cannot_be_quantised_is_not_planned(tmp_path, capsys):
    """MLX quantises in groups, which a head of 80 has none of; the plan said that it fits."""
    heads = {"hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | heads))
    assert run(str(tmp_path), "--kv-bits", "4") == 2
    assert "--kv-bits: the cache of this model cannot be quantised" in capsys.readouterr().err


def test_without_a_reach_the_trained_length_is_planned(tmp_path, capsys):
    """dynamic has no reach, and 2,048 tokens were planned for whatever the trained length."""
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8192}
    mine = {"model_file": "mlx_clex_model.py"}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | dynamic | mine))
    assert run(str(tmp_path)) == 0
    assert "reading 8,192 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_a_config_that_lacks_what_a_plan_needs(tmp_path, capsys, name):
    """The error names the entry, not a Python function."""
    config = {key: value for key, value in LLAMA_7B.items() if key != name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(str(tmp_path)) == 2
    assert f"config.json lacks {name}" in capsys.readouterr().err
