"""The differences of two models equal a plain computation over all logits."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_clex.convert import convert

from mlx_clex import compare, load
from mlx_clex.compare import buckets, differences
from mlx_clex.evaluation import perplexity as evaluation
from mlx_clex.evaluation.results import read_results

from .conftest import GOLDEN, scaled_llama, stock_folder, tiny_llama

TEXT = "the quick brown fox runs away from the lazy dog . " * 20


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def call(*argv):
    return compare.main([str(arg) for arg in argv])


def rows(capsys, *argv):
    assert call(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)["results"]


def log_softmax(model, ids):
    """Return the log-probabilities of one pass, float64, (L - 1, V)."""
    logits = np.array(model(mx.array(ids)[None])[0, :-1].astype(mx.float32), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_differences_equal_a_plain_computation(monkeypatch):
    """KL, most likely tokens and losses are computed from all logits in numpy."""
    monkeypatch.setattr(evaluation, "_STEP", 37)
    a, b = scaled_llama("clex"), scaled_llama("yarn", seed=0)
    ids = np.random.default_rng(0).integers(0, 64, 60)
    found = differences(a, b, ids)
    log_a, log_b = log_softmax(a, ids), log_softmax(b, ids)
    kl = (np.exp(log_a) * (log_a - log_b)).sum(-1)
    assert np.abs(found[:, 0] - kl).max() < 1e-4
    assert (found[:, 1] == (log_a.argmax(-1) != log_b.argmax(-1))).all()
    assert 0 < found[:, 1].mean() < 1
    every = np.arange(59)
    assert np.abs(found[:, 2] + log_a[every, ids[1:]]).max() < 1e-4
    assert np.abs(found[:, 3] + log_b[every, ids[1:]]).max() < 1e-4


def test_a_model_does_not_differ_from_itself(converted, text, tmp_path, capsys):
    """Each bucket must be exactly 0; in three windows of 100 tokens 99 positions count."""
    folder = converted("clex_llama")
    argv = (folder, folder, "--data", text, "--length", 100, "--windows", 3)
    found = rows(capsys, *argv, "--output", tmp_path / "out")
    assert [(row["first"], row["last"], row["tokens"]) for row in found] == [
        (1, 15, 45),
        (16, 31, 48),
        (32, 63, 96),
        (64, 99, 108),
    ]
    assert all(row["kl"] == 0 == row["flips"] for row in found)
    assert all(row["perplexity_a"] == row["perplexity_b"] for row in found)
    # The folder's name would not tell the two apart.
    assert found[0]["label_a"] == str(folder)
    assert read_results(tmp_path / "out", "compare").rows == found

    # The perplexity of all positions equals that of `perplexity`.
    assert call(*argv) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    model, tokenizer = load(folder)
    ids = np.array([*tokenizer.encode(TEXT), tokenizer.eos_token_id])
    corpus = evaluation.Corpus("text", ids, np.array([0]), np.array([0]))
    plain = evaluation.score(model, corpus, 100, 3).perplexity
    assert last[:4] == ["all", "297", "0.000e+00", "0.00%"]
    assert math.isclose(float(last[4]), plain, rel_tol=1e-5)


def test_a_second_run_measures_nothing(converted, text, tmp_path, capsys, monkeypatch):
    """The stored rows are printed; other models with the same PREFIX are refused."""
    folder = converted("clex_llama")
    argv = (folder, folder, "--data", text, "--length", 50, "--output", tmp_path / "out")
    assert call(*argv) == 0
    printed = capsys.readouterr().out
    monkeypatch.delattr(compare, "differences")
    assert call(*argv) == 0
    assert capsys.readouterr().out == printed
    assert call(*argv, "--scale-b", 2) == 2
    assert "weights_b: " in capsys.readouterr().err


def test_a_frozen_model_equals_the_unfrozen_one_at_its_scale(text, tmp_path, capsys):
    """At four trained lengths CLEX has scale 4; at three trained lengths the models differ."""
    convert(GOLDEN / "clex_llama", tmp_path / "ours", dtype="float32")
    convert(GOLDEN / "clex_llama", tmp_path / "frozen", freeze=4, dtype="float32")
    argv = (tmp_path / "ours", tmp_path / "frozen", "--data", text, "--windows", 1)
    same = rows(capsys, *argv, "--length", 128)
    assert max(abs(row["kl"]) for row in same) < 1e-6
    assert max(row["kl"] for row in rows(capsys, *argv, "--length", 96)) > 1e-4
    held = rows(capsys, *argv, "--length", 96, "--scale-a", 4)
    assert max(abs(row["kl"]) for row in held) < 1e-6
    assert (held[0]["label_a"], held[0]["label_b"]) == ("ours at scale 4", "frozen")


def test_quantised_models_differ_a_little(text, tmp_path, capsys):
    """4 bits must differ more than 8 bits."""
    convert(GOLDEN / "clex_llama", tmp_path / "ours", dtype="float32")
    off = []
    for bits in (8, 4):
        options = {"quantize": True, "q_bits": bits, "q_group_size": 32, "dtype": "float32"}
        convert(GOLDEN / "clex_llama", tmp_path / f"q{bits}", **options)
        argv = (tmp_path / "ours", tmp_path / f"q{bits}", "--data", text, "--length", 64)
        off.append(np.mean([row["kl"] for row in rows(capsys, *argv)]))
    assert 0 < off[0] < off[1] / 4


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (2, [(1, 1)]),
        (16, [(1, 15)]),
        (17, [(1, 15), (16, 16)]),
        (64, [(1, 15), (16, 31), (32, 63)]),
    ],
)
def test_buckets_cover_each_position_once(length, expected):
    """The last bucket ends at the last position, for any length."""
    assert buckets(length) == expected


def test_bad_input_is_one_line(converted, text, tmp_path, capsys):
    """Other tokenizers or vocabularies and bad lengths or windows must end in one line."""
    folder = converted("clex_llama")
    other = stock_folder(tmp_path, folder, vocab_size=512, max_position_embeddings=32)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    for argv, match in [
        ((folder, other), "tokenise the text differently"),
        ((folder, folder, "--windows", 0), "--windows must be at least 1"),
        ((folder, folder, "--length", 300), "this model reaches"),
        ((folder, folder, "--length", 1), "at least 2 tokens"),
        ((folder, folder, "--scale-b", 99), "within 1..8"),
        ((folder, folder, "--adapter-path-a", tmp_path / "x"), "no adapter_config.json"),
    ]:
        assert call(*argv, "--data", text) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("mlx_clex compare: error: ")
        assert match in error
    with pytest.raises(ValueError, match="A has a vocabulary of 64 tokens and B one of 96"):
        differences(tiny_llama(), tiny_llama(vocabulary=96), np.arange(30))
