"""The perplexity command equals plain loops and stores its results."""

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
from mlx_clex.bundled import MODELS
from mlx_clex.evaluation import perplexity as evaluation
from mlx_clex.evaluation import perplexity_table
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
    return perplexity.main([str(arg) for arg in argv])


def rows(capsys, *argv):
    """Return the rows that --json prints, by label and length."""
    assert call(*argv, "--json") == 0
    found = json.loads(capsys.readouterr().out)["results"]
    return {(row["label"], row["length"]): row for row in found}


def ids_of(folder, text=TEXT):
    _, tokenizer = load(folder)
    return np.array([*tokenizer.encode(text), tokenizer.eos_token_id])


def test_perplexity_equals_that_of_a_single_pass(converted, text, capsys):
    """The perplexity of a window is exp of its mean loss, at the scale of its length."""
    folder = converted("clex_llama")
    argv = ("--model", folder, "--data", text, "--windows", 1, "--lengths", 32, 100)
    argv += ("--protocol", "whole")
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
        """Return the loss of each of ids[1:]."""
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
def test_perplexity_equals_that_of_transformers(protocol, option, text, tmp_path, capsys):
    """A golden model frozen for transformers equals ours at that fixed scale."""
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


def test_the_table_has_a_scale_for_each_length(converted, text, capsys):
    """The default lengths are 1, 2 and 4 x the trained length; the protocol is named."""
    assert call("--model", converted("gene_llama"), "--data", text, "--windows", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Protocol same-targets: {text} (train), 4322 tokens."
    assert lines[1].split()[:6] == ["model", "tokens", "scale", "windows", "scored", "perplexity"]
    assert [line.split()[:5] for line in lines[2:]] == [
        ["gene_llama", "64", "8", "5", "315"],
        ["gene_llama", "128", "8", "5", "315"],
        ["gene_llama", "256", "8", "5", "315"],
    ]
    assert lines[1].split()[-6:] == ["/", "at", "64", "95", "%", "interval"]
    assert [line.split()[7] + line.split()[11] for line in lines[2:]] == ["...."] * 3


def test_ratios_are_paired_over_windows(converted, text, tmp_path, capsys):
    """Two intervals that overlap said nothing; a resumed run has the same ratios."""
    argv = ("--model", converted("clex_llama"), "--data", text, "--windows", 6)
    argv += ("--lengths", 40, 200, "--output", tmp_path / "out")
    found = rows(capsys, *argv)
    short, long = found["clex_llama", 40], found["clex_llama", 200]
    logs = np.subtract(long["losses"], short["losses"])
    assert short["tokens"] == long["tokens"] == 6 * 31
    assert (short["ratio"], short["ratio_low"], short["ratio_high"]) == (1, 1, 1)
    assert math.isclose(long["ratio"], math.exp(logs.mean()), rel_tol=1e-9)
    margin = 2.5706 * logs.std(ddof=1) / math.sqrt(6)
    assert math.isclose(long["ratio_high"], math.exp(logs.mean() + margin), rel_tol=1e-3)
    table = (tmp_path / "out.csv").read_text().splitlines()
    assert "losses" not in table[0]
    whole = json.loads((tmp_path / "out.json").read_text())
    del whole["rows"][1]
    (tmp_path / "out.json").write_text(json.dumps(whole))
    assert rows(capsys, *argv) == found


def test_scalings_on_the_same_weights(text, tmp_path, converted, capsys):
    """Each result equals that of an attached scaling; the longest length sets the factor."""
    tokens = converted("gene_llama")
    base = stock_folder(tmp_path, tokens, vocab_size=512, max_position_embeddings=32)
    argv = ("--model", base, "--data", text, "--windows", 2, "--lengths", 32, 128)
    argv += ("--protocol", "whole")
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
        plain = evaluation.score(model, corpus, 128, 2).perplexity
        row = found[f"stock + {label}", 128]
        assert math.isclose(row["perplexity"], plain, rel_tol=1e-6)
        assert row["scale"] == model.scale_at(128)
        assert row["reach"] == model.reach
    # At the trained length dynamic and clex equal the base.
    assert len({row["perplexity"] for row in found.values()}) == len(found) - 2

    assert call(*argv, "--scalings", "ntk", "yarn", "--factor", 8) == 0
    out = capsys.readouterr().out
    assert "inference-time scaling only" in out
    assert "stock + ntk 8" in out
    assert out.splitlines()[-1].startswith("stock + yarn 8")  # in the table by length


def test_models_with_different_tokenizers_are_refused(converted, text, tmp_path, capsys):
    """One table listed perplexities of different tokenizers."""
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
    assert "stock and clex_llama tokenise the text differently" in capsys.readouterr().err


def test_a_killed_run_continues(converted, text, tmp_path, capsys):
    """After a SIGKILL the stored rows must not be measured again."""
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

    # A value that a measurement would not give.
    killed["rows"][0]["perplexity"] = 1234.5
    (tmp_path / "out.json").write_text(json.dumps(killed))
    found = rows(capsys, *argv)
    assert found["clex_llama", 40]["perplexity"] == 1234.5
    assert [length for _, length in found] == [*lengths]
    assert read_results(tmp_path / "out").rows == [*found.values()]


def test_an_interrupted_run_keeps_its_rows(converted, text, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second row gives exit status 130; a third run measures nothing."""
    argv = ("--model", converted("clex_llama"), "--data", text, "--windows", 1)
    argv += ("--lengths", 40, 80, "--output", tmp_path / "out")
    plain = perplexity_table.score

    def interrupted(model, corpus, length, *args, **kwargs):
        if length == 80:
            raise KeyboardInterrupt
        return plain(model, corpus, length, *args, **kwargs)

    monkeypatch.setattr(perplexity_table, "score", interrupted)
    assert call(*argv) == 130
    assert [row["length"] for row in read_results(tmp_path / "out").rows] == [40]
    monkeypatch.setattr(perplexity_table, "score", plain)
    assert call(*argv) == 0
    monkeypatch.delattr(perplexity_table, "score")
    capsys.readouterr()
    assert call(*argv) == 0, "a finished run measured a row again"
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["40", "80"]


def test_results_of_another_run_are_kept(converted, text, tmp_path, capsys):
    """Another protocol, text or model of the same name must be refused."""
    argv = ("--model", converted("clex_llama"), "--data", text, "--windows", 1, "--lengths", 40)
    argv += ("--output", tmp_path / "out")
    assert call(*argv) == 0
    before = read_results(tmp_path / "out").rows

    assert call(*argv, "--protocol", "chunked") == 2
    assert 'protocol: "same-targets" in the file, "chunked" now' in capsys.readouterr().err
    text.write_text(TEXT + "And more.")
    assert call(*argv) == 2
    assert "tokens: " in capsys.readouterr().err
    text.write_text(TEXT)
    other = tmp_path / "clex_llama"
    convert(GOLDEN / "clex_llama_gqa_log_scale", other)
    assert call("--model", other, *argv[2:]) == 2
    assert "results of another model named clex_llama" in capsys.readouterr().err
    assert read_results(tmp_path / "out").rows == before


def test_the_default_is_the_bundled_models(text, tmp_path, converted, capsys, monkeypatch):
    """The default is the base with three scalings and its fine-tunes, at 1 to 16 x L0."""
    stock = stock_folder(tmp_path, converted("clex_llama"), vocab_size=512)
    models = {name: str(tmp_path / name) for name in ("base", "clex", "gene")}
    convert(stock, models["base"])
    convert(stock, models["clex"], scaling={"type": "clex", "max_factor": 16})
    convert(stock, models["gene"], scaling={"type": "gene", "factor": 16})
    for name, path in models.items():
        monkeypatch.setitem(MODELS, name, path)
    monkeypatch.setattr("mlx_clex.evaluation.corpus.held_out_text", lambda: TEXT)
    monkeypatch.chdir(tmp_path)
    found = rows(capsys, "--windows", "1")
    assert list(dict.fromkeys(label for label, _ in found)) == [
        "base + none",
        "base + ntk 16",
        "base + yarn 16",
        "base + yarn-t 16",
        "clex",
        "gene",
    ]
    assert {length for _, length in found} == {16, 32, 64, 128, 256}
    linear = ("--scalings", "linear", "--lengths", "32", "--output", "linear")
    found = rows(capsys, "--windows", "1", *linear)
    assert list(found) == [("base + linear 2", 32)]


def test_a_terminal_shows_progress(converted, text):
    """The progress bar must show the remaining time and tokens per second."""
    options = ["--model", str(converted("clex_llama")), "--data", str(text)]
    options += ["--lengths", "200", "--windows", "3"]
    child = pexpect.spawn(
        sys.executable, ["-m", "mlx_clex.perplexity", *options], timeout=120, encoding="utf-8"
    )
    # The bar may appear before or after the row.
    shown = child.read()
    child.close()
    assert re.search(r"clex_llama, 200 tokens: +\d+%[^\r]*<\d\d:\d\d[^\r]*tok/s", shown)
    assert re.search(r"clex_llama +200 +7 +3 ", shown)
    assert child.exitstatus == 0


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--lengths", "300"), "this model reaches"),
        (("--lengths", "1"), "at least 2 tokens, got 1"),
        (("--windows", "0"), "--windows"),
        (("--lengths", "20", "64"), "--lengths 20 is below the trained length"),
        (("--split", "valid", "--data", "nowhere"), "neither a folder"),
        (("--scale", "99"), "within 1..8"),
        (("--chunk", "20"), "--chunk needs --protocol chunked, got same-targets"),
        (("--stride", "20"), "--stride needs --protocol sliding"),
        (("--protocol", "chunked", "--chunk", "1"), "--chunk must be at least 2"),
        (("--protocol", "sliding", "--stride", "0"), "--stride must be at least 1"),
        (("--factor", "4"), "--factor needs --scalings"),
        (("--scalings", "dynamic", "--factor", "4"), "no effect on --scalings dynamic"),
        (("--scalings", "ntk", "--scale", "2"), "exclude each other"),
        (("--scalings", "ntk", "--factor", "0.5"), "--factor must be at least 1"),
        (("--kv-bits", "4", "--kv-group-size", "128"), "cannot be quantised"),
        (("--kv-bits", "8", "--kv-group-size", "0"), "--kv-group-size must be at least 1, got 0"),
        (("--scalings", "clex", "--factor", "inf"), "--factor must be at least 1 and finite"),
        (("--adapter-path", "nowhere"), "nowhere has no adapter_config.json"),
    ],
)
def test_bad_input_is_one_line(converted, text, capsys, more, match):
    """The exit status is 2, and the error names the option."""
    assert call("--model", converted("clex_llama"), "--data", text, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert match in error
    assert error.startswith("mlx_clex perplexity: error: ")


def test_records_of_a_jsonl_file_are_texts(converted, text, tmp_path, capsys):
    """A window must lie within one record, and short records are skipped."""
    file = tmp_path / "records.jsonl"
    records = [TEXT[:400], TEXT[:40], TEXT[:900]]
    file.write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    argv = ("--model", converted("clex_llama"), "--data", file)
    found = rows(capsys, *argv, "--lengths", 100, 250, "--protocol", "chunked", "--chunk", 90)
    assert found["clex_llama", 100]["windows"] == 2 + 6
    assert found["clex_llama", 250]["windows"] == 1 + 2
    assert found["clex_llama", 250]["tokens"] == 3 * 247


def test_adapters_need_a_single_model(converted, text, capsys):
    """The adapters were added to all models."""
    models = converted("clex_llama"), converted("gene_llama")
    assert call("--model", *models, "--data", text, "--adapter-path", "x") == 2
    assert "--adapter-path needs a single --model" in capsys.readouterr().err


def test_a_text_shorter_than_the_length_is_refused(converted, text, capsys):
    """The error must name the length that does not fit."""
    text.write_text("the quick brown fox " * 3)
    assert call("--model", converted("clex_llama"), "--data", text) == 2
    assert "too few for a length of 64" in capsys.readouterr().err


def test_joining_of_short_texts_is_reported(converted, text, tmp_path, capsys):
    """A window went from one document into the next without a message."""
    file = tmp_path / "records.jsonl"
    record = json.dumps({"text": TEXT[:150]}) + "\n"
    file.write_text(record * 4)
    argv = ("--model", converted("clex_llama"), "--data", file, "--windows", 1)
    assert call(*argv, "--lengths", 50, 250) == 2
    assert "(train) has 250 tokens (the longest has 110)" in capsys.readouterr().err
    argv += ("--protocol", "whole")
    assert call(*argv, "--lengths", 50) == 0
    assert "end to end" not in capsys.readouterr().out
    assert call(*argv, "--lengths", 50, 250) == 0
    assert "No text has 250 tokens, so all texts are joined" in capsys.readouterr().out


def test_a_failure_of_mlx_is_one_line(converted, text, monkeypatch, capsys):
    """Out of memory at a long length was a traceback."""

    def fail(*args, **options):
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr("mlx_clex.evaluation.perplexity.hidden_states", fail)
    assert call("--model", converted("clex_llama"), "--data", text, "--lengths", 50) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error
        == "mlx_clex perplexity: failed: MLX failed at token 0 of 50: [malloc] Unable to allocate"
    )
