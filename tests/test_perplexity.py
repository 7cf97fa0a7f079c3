"""The perplexity command against plain loops, and its figures on disk."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pexpect
import pytest
import torch
import transformers
from mlx_clex.convert import convert

from mlx_clex import attach, load, perplexity
from mlx_clex.commands.run_command import run_command
from mlx_clex.evaluation import perplexity as evaluation
from mlx_clex.evaluation.results import read_results

from .checkpoints import torch_cache
from .conftest import GOLDEN, stock_folder

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


def rows(capsys, *argv):
    """The rows that --json prints, by label and length."""
    assert call(*argv, "--json") == 0
    found = json.loads(capsys.readouterr().out)["results"]
    return {(row["label"], row["length"]): row for row in found}


def ids_of(folder, text=TEXT):
    _, tokenizer = load(folder)
    return np.array([*tokenizer.encode(text), tokenizer.eos_token_id])


def test_the_figure_is_the_plain_one(converted, text, capsys):
    """One window: exp of the mean loss of a single pass, at the scale of its length."""
    folder = converted("clex_llama")
    argv = ("--model", folder, "--data", text, "--windows", 1, "--lengths", 32, 100)
    found = rows(capsys, *argv)
    model, _ = load(folder)
    for (label, length), row in found.items():
        window = mx.array(ids_of(folder)[:length])[None]
        logits = model(window).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits[:, :-1], window[:, 1:])
        assert math.isclose(row["perplexity"], math.exp(losses.mean().item()), rel_tol=1e-4)
        assert row["scale"] == math.ceil(length / 32)
        assert (label, row["tokens"]) == ("clex_llama", length - 1)
        assert (row["trained_length"], row["reach"], row["low"]) == (32, 256, None)


class Transformers:
    """A plain loop over a model of transformers."""

    def __init__(self, folder):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def losses(self, ids, cache=None):
        """Of ids[1:], each by itself."""
        cache = cache or torch_cache(self.model)
        ids = torch.tensor(np.asarray(ids, np.int64))[None]
        with torch.no_grad():
            out = self.model(ids, **cache, use_cache=True)
        losses = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
        return losses.tolist()

    def whole(self, ids, length):
        starts = range(0, len(ids) - length + 1, length)
        return [self.losses(ids[start : start + length]) for start in starts]

    def chunked(self, ids, length, chunk):
        found = []
        for window in range(0, len(ids) - length + 1, length):
            cache = torch_cache(self.model)
            for start in range(window, window + length, chunk):
                found.append(self.losses(ids[start : start + chunk], cache))
        return found

    def sliding(self, ids, length, stride):
        starts = range(0, len(ids) - length + 1, stride)
        return [self.losses(ids[start : start + length]) for start in starts]


@pytest.mark.parametrize(
    ("protocol", "option"),
    [("whole", ()), ("chunked", ("--chunk", 24)), ("sliding", ("--stride", 30))],
)
def test_transformers_has_the_same_figures(protocol, option, text, tmp_path, capsys):
    """A golden model, frozen for transformers, and ours held at that scale."""
    text.write_text(TEXT[:600])
    convert(GOLDEN / "clex_llama", tmp_path / "ours", dtype="float32")
    frozen = {"freeze": 4, "freeze_for": "transformers"}
    convert(GOLDEN / "clex_llama", tmp_path / "frozen", dtype="float32", **frozen)
    argv = ("--model", tmp_path / "ours", "--data", text, "--scale", 4, "--lengths", 120)
    found = rows(capsys, *argv, "--protocol", protocol, *option)
    row = found["ours at scale 4", 120]

    ids = ids_of(tmp_path / "ours", TEXT[:600])
    losses = getattr(Transformers(tmp_path / "frozen"), protocol)(ids, 120, *option[1:])
    assert row["tokens"] == sum(map(len, losses))
    assert math.isclose(row["perplexity"], math.exp(np.concatenate(losses).mean()), rel_tol=1e-3)


def test_a_table_with_a_scale_for_every_length(converted, text, capsys):
    """Trained length, 2 x and 4 x by default; the protocol is named."""
    assert call("--model", converted("gene_llama"), "--data", text, "--windows", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Protocol whole: {text} (train), 4322 tokens."
    assert lines[1].split()[:5] == ["model", "tokens", "scale", "windows", "perplexity"]
    assert [line.split()[:4] for line in lines[2:]] == [
        ["gene_llama", "64", "8", "2"],
        ["gene_llama", "128", "8", "2"],
        ["gene_llama", "256", "8", "2"],
    ]
    assert all(line.split()[6] == ".." for line in lines[2:])


def test_scalings_on_the_same_weights(text, tmp_path, converted, capsys):
    """Each as if the model had been converted with it; the factor is that of the lengths."""
    tokens = converted("gene_llama")
    base = stock_folder(tmp_path, tokens, vocab_size=512, max_position_embeddings=32)
    argv = ("--model", base, "--data", text, "--windows", 2, "--lengths", 32, 128)
    names = ("none", "ntk", "dynamic", "clex", "gene")
    found = rows(capsys, *argv, "--scalings", *names)
    labels = ["none", "ntk 4", "dynamic", "clex 4", "gene 4"]
    assert [label for label, n in found if n == 128] == [f"stock + {text}" for text in labels]
    model, _ = load(base)
    ids = ids_of(base)
    corpus = evaluation.Corpus("text", ids, np.array([0]), np.array([0]))
    for name, label in zip(names, labels, strict=True):
        options = {"factor": 4} if name in ("ntk", "gene") else {}
        options = {"max_factor": 4} if name == "clex" else options
        attach(model, {"type": name, **options}, trained_length=32)
        plain = evaluation.perplexity(model, corpus, 128, 2)
        row = found[f"stock + {label}", 128]
        assert math.isclose(row["perplexity"], plain, rel_tol=1e-6)
        assert row["scale"] == model.scale_at(128)
        assert row["reach"] == model.reach
    # Within the trained length dynamic and clex are the base itself.
    assert len({row["perplexity"] for row in found.values()}) == len(found) - 2

    assert call(*argv, "--scalings", "ntk", "yarn", "--factor", 8) == 0
    out = capsys.readouterr().out
    assert "inference-time scaling only" in out
    assert "stock + ntk 8" in out
    assert out.splitlines()[-1].startswith("stock + yarn 8")  # of the table by length


def test_several_models_have_one_tokenizer(converted, text, tmp_path, capsys):
    """Perplexities of other tokens were listed side by side as if they compared."""
    models = converted("clex_llama"), converted("clex_llama_gqa_log_scale")
    argv = ("--data", text, "--windows", 1, "--lengths", 50)
    assert {label for label, _ in rows(capsys, "--model", *models, *argv)} == {
        "clex_llama",
        "clex_llama_gqa_log_scale",
    }
    other = stock_folder(tmp_path, models[0], vocab_size=512, max_position_embeddings=32)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    assert call("--model", models[0], other, *argv) == 2
    assert "stock and clex_llama read the text as different tokens" in capsys.readouterr().err


def test_a_killed_run_goes_on(converted, text, tmp_path, capsys):
    """SIGKILL between two rows; those on disk are not measured again, the others are."""
    lengths = range(40, 240, 10)
    argv = ("--model", converted("clex_llama"), "--data", text, "--windows", 2)
    argv += ("--lengths", *lengths, "--output", tmp_path / "out")
    command = [sys.executable, "-m", "mlx_clex.perplexity", *map(str, argv)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.json").is_file() or not read_results(tmp_path / "out").rows:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = json.loads((tmp_path / "out.json").read_text())
    assert 1 <= len(killed["rows"]) < len(lengths)

    # A figure that nobody would measure.
    killed["rows"][0]["perplexity"] = 1234.5
    (tmp_path / "out.json").write_text(json.dumps(killed))
    found = rows(capsys, *argv)
    assert found["clex_llama", 40]["perplexity"] == 1234.5
    assert [length for _, length in found] == [*lengths]
    assert read_results(tmp_path / "out").rows == [*found.values()]


def test_an_interrupted_run_keeps_its_rows(converted, text, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second row: exit 130, and the third command finds both."""
    argv = ("--model", converted("clex_llama"), "--data", text, "--windows", 1)
    argv += ("--lengths", 40, 80, "--output", tmp_path / "out")
    plain = perplexity.score

    def interrupted(model, corpus, length, *args, **kwargs):
        if length == 80:
            raise KeyboardInterrupt
        return plain(model, corpus, length, *args, **kwargs)

    monkeypatch.setattr(perplexity, "score", interrupted)
    assert call(*argv) == 130
    assert [row["length"] for row in read_results(tmp_path / "out").rows] == [40]
    monkeypatch.setattr(perplexity, "score", plain)
    assert call(*argv) == 0
    monkeypatch.delattr(perplexity, "score")
    capsys.readouterr()
    assert call(*argv) == 0, "a run that has every row measured one"
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["40", "80"]


def test_results_of_another_run(converted, text, tmp_path, capsys):
    """Another protocol, text or model under the same name: one line, and nothing is lost."""
    argv = ("--model", converted("clex_llama"), "--data", text, "--windows", 1, "--lengths", 40)
    argv += ("--output", tmp_path / "out")
    assert call(*argv) == 0
    before = read_results(tmp_path / "out").rows

    assert call(*argv, "--protocol", "chunked") == 2
    assert 'protocol: "whole" there, "chunked" here' in capsys.readouterr().err
    text.write_text(TEXT + "And more.")
    assert call(*argv) == 2
    assert "tokens: " in capsys.readouterr().err
    text.write_text(TEXT)
    other = tmp_path / "clex_llama"
    convert(GOLDEN / "clex_llama_gqa_log_scale", other)
    assert call("--model", other, *argv[2:]) == 2
    assert "figures of another model called clex_llama" in capsys.readouterr().err
    assert read_results(tmp_path / "out").rows == before


def test_without_options_the_bundled_models(text, tmp_path, converted, capsys, monkeypatch):
    """Stand-ins for them: the base under three scalings and its fine-tunes, 1 to 16 x L0."""
    stock = stock_folder(tmp_path, converted("clex_llama"), vocab_size=512)
    models = {name: str(tmp_path / name) for name in ("base", "clex", "gene")}
    convert(stock, models["base"])
    convert(stock, models["clex"], scaling={"type": "clex", "max_factor": 16})
    convert(stock, models["gene"], scaling={"type": "gene", "factor": 16})
    monkeypatch.setattr(perplexity, "MODELS", models)
    monkeypatch.setattr(perplexity, "held_out_text", lambda: TEXT)
    monkeypatch.chdir(tmp_path)
    found = rows(capsys, "--windows", "1")
    assert list(dict.fromkeys(label for label, _ in found)) == [
        "base + none",
        "base + ntk 16",
        "base + yarn 16",
        "clex",
        "gene",
    ]
    assert {length for _, length in found} == {16, 32, 64, 128, 256}
    found = rows(capsys, "--windows", "1", "--scalings", "linear", "--lengths", "32")
    assert list(found) == [("base + linear 2", 32)]


def test_a_terminal_is_told_how_long_it_takes(converted, text):
    """Progress with time left, on stderr."""
    options = ["--model", str(converted("clex_llama")), "--data", str(text)]
    options += ["--lengths", "200", "--windows", "3"]
    child = pexpect.spawn(
        sys.executable, ["-m", "mlx_clex.perplexity", *options], timeout=120, encoding="utf-8"
    )
    # The bar is drawn when there is time for it, before the row or after.
    shown = child.read()
    child.close()
    assert re.search(r"clex_llama, 200 tokens: +\d+%[^\r]*<\d\d:\d\d[^\r]*tok/s", shown)
    assert re.search(r"clex_llama +200 +7 +3 ", shown)
    assert child.exitstatus == 0


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--lengths", "300"), "beyond the reach"),
        (("--lengths", "1"), "at least 2 tokens, got 1"),
        (("--windows", "0"), "--windows"),
        (("--split", "valid", "--data", "nowhere"), "neither a folder"),
        (("--scale", "99"), "within 1..8"),
        (("--chunk", "20"), "--chunk goes with --protocol chunked, not whole"),
        (("--stride", "20"), "--stride goes with --protocol sliding"),
        (("--protocol", "chunked", "--chunk", "1"), "--chunk must be at least 2"),
        (("--protocol", "sliding", "--stride", "0"), "--stride must be at least 1"),
        (("--factor", "4"), "--factor is that of --scalings"),
        (("--scalings", "dynamic", "--factor", "4"), "changes nothing of --scalings dynamic"),
        (("--scalings", "ntk", "--scale", "2"), "exclude each other"),
        (("--scalings", "ntk", "--factor", "0.5"), "--factor must be at least 1"),
        (("--kv-bits", "4", "--kv-group-size", "128"), "cannot be quantised"),
        (("--adapter-path", "nowhere"), "nowhere has no adapter_config.json"),
    ],
)
def test_bad_input_is_one_line(converted, text, capsys, more, match):
    """Exit 2."""
    assert call("--model", converted("clex_llama"), "--data", text, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert match in error
    assert error.startswith("perplexity: error: ")


def test_a_jsonl_file(converted, text, tmp_path, capsys):
    """A record is a text; a window lies within one that holds it."""
    file = tmp_path / "records.jsonl"
    records = [TEXT[:400], TEXT[:40], TEXT[:900]]
    file.write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    argv = ("--model", converted("clex_llama"), "--data", file)
    found = rows(capsys, *argv, "--lengths", 100, 250, "--protocol", "chunked", "--chunk", 90)
    assert found["clex_llama", 100]["windows"] == 2 + 6
    assert found["clex_llama", 250]["windows"] == 1 + 2
    assert found["clex_llama", 250]["tokens"] == 3 * 247


def test_adapters_are_those_of_one_model(converted, text, capsys):
    """They would have been put on all of them."""
    models = converted("clex_llama"), converted("gene_llama")
    assert call("--model", *models, "--data", text, "--adapter-path", "x") == 2
    assert "--adapter-path goes with a single --model" in capsys.readouterr().err


def test_a_text_shorter_than_the_length(converted, text, capsys):
    """How long it is, and what fits."""
    text.write_text("the quick brown fox " * 3)
    assert call("--model", converted("clex_llama"), "--data", text) == 2
    assert "too few for a length of 64" in capsys.readouterr().err


def test_texts_that_are_too_short_are_joined_aloud(converted, text, tmp_path, capsys):
    """A document was measured past its end, in the middle of the next, without a word."""
    file = tmp_path / "records.jsonl"
    record = json.dumps({"text": TEXT[:150]}) + "\n"
    file.write_text(record * 4)
    argv = ("--model", converted("clex_llama"), "--data", file, "--windows", 1)
    assert call(*argv, "--lengths", 50) == 0
    assert "end to end" not in capsys.readouterr().out
    assert call(*argv, "--lengths", 50, 250) == 0
    assert "No text of it has 250 tokens: all are read as one" in capsys.readouterr().out


def test_a_failure_of_mlx_is_one_line(converted, text, monkeypatch, capsys):
    """Out of memory at a long length was a traceback."""

    def fail(*args, **options):
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr("mlx_clex.evaluation.perplexity.hidden_states", fail)
    assert call("--model", converted("clex_llama"), "--data", text, "--lengths", 50) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "perplexity: failed: MLX failed at token 0 of 50: [malloc] Unable to allocate"
