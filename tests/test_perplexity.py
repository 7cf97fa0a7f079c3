"""The perplexity command against a plain computation."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_clex import load, perplexity
from mlx_clex.cli import run_command

TEXT = "the quick brown fox runs away from the lazy dog . " * 120


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def call(*argv):
    argv = [str(arg) for arg in argv]
    return run_command(
        perplexity.add_arguments, perplexity.run, prog="perplexity", description="", argv=argv
    )


def test_the_figure_is_the_plain_one(converted, text, capsys):
    """One window: exp of the mean loss of a single pass, at the scale of its length."""
    folder = converted("clex_llama")
    argv = ("--model", folder, "--data", text, "--windows", 1, "--json", "--lengths", 32, 100)
    assert call(*argv) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    model, tokenizer = load(folder)
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_token_id]
    for result, length in zip(results, (32, 100), strict=True):
        window = mx.array(ids[:length])[None]
        losses = nn.losses.cross_entropy(model(window[:, :-1]).astype(mx.float32), window[:, 1:])
        assert math.isclose(result["perplexity"], math.exp(losses.mean().item()), rel_tol=1e-4)
        assert result["scale"] == math.ceil(length / 32)


def test_the_table_names_its_protocol(converted, text, capsys):
    """Trained length, 2 x and 4 x by default."""
    assert call("--model", converted("gene_llama"), "--data", text) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Protocol whole")
    assert [line.split()[0] for line in lines[2:]] == ["64", "128", "256"]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--lengths", "300"), "beyond the reach"),
        (("--windows", "0"), "--windows"),
        (("--split", "valid", "--data", "nowhere"), "neither a folder"),
        (("--scale", "99"), "within 1..8"),
    ],
)
def test_bad_input_is_one_line(converted, text, capsys, more, match):
    """Exit 2."""
    assert call("--model", converted("clex_llama"), "--data", text, *more) == 2
    assert match in capsys.readouterr().err


def test_a_text_shorter_than_the_length(converted, text, capsys):
    """File and length are named."""
    text.write_text("short")
    assert call("--model", converted("clex_llama"), "--data", text) == 2
    assert "too few for a length of 32" in capsys.readouterr().err
