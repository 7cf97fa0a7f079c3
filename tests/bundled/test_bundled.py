"""The bundled models and text must load, match their description and stay small."""

import json

import numpy as np
import pytest

from benchmarks import bundled_models as make
from mlx_clex import bundled
from mlx_clex.data.corpus import load_corpora
from mlx_clex.errors import InputError
from mlx_clex.evaluation.perplexity import score
from mlx_clex.loading import load
from mlx_clex.model.scaled_model import ScaledModel


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "text.txt").write_text(bundled.held_out_text())
    return folder


def perplexity(name, held_out, length):
    model, tokenizer = load(f"bundled:{name}")
    corpus = load_corpora(
        held_out, tokenizer, mask_prompt=False, cache_dir=held_out / "cache", splits=["train"]
    )["train"]
    return score(model, corpus, length, 8192 // length).perplexity


def test_the_package_stays_within_eight_megabytes():
    files = [path for path in bundled.FOLDER.rglob("*") if path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 8e6


def test_held_out_books_are_not_in_the_training_text():
    """Perplexity on training text says nothing about extrapolation."""
    held_out = bundled.held_out_text()
    assert held_out.startswith("Judges 1\n")
    assert "\n1 Samuel 31\n" in held_out
    assert "2 Samuel" not in held_out
    assert len(bundled.training_text()) + len(held_out) == len(bundled.text())
    verses = {line for line in held_out.splitlines() if len(line) > 60}
    shared = verses & set(bundled.training_text().splitlines())
    assert len(shared) < 0.01 * len(verses)


def test_training_data_has_books_and_hidden_keys(tmp_path):
    make.write_data(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    keys = [text for text in texts if bundled.QUESTION in text]
    assert len(texts) - len(keys) == 66 - len(bundled.HELD_OUT)
    for text in keys:
        lines = text.splitlines()
        assert lines[0] == lines[-1] == bundled.statement(lines[0][-5:-1])


@pytest.mark.parametrize("name", ["clex", "gene"])
def test_fine_tunes_read_far_beyond_the_trained_length(name, held_out):
    """At 8 x the trained length the base fails and the fine-tunes do not."""
    assert perplexity("base", held_out, 512) > 2 * perplexity("base", held_out, 64)
    assert perplexity(name, held_out, 512) < 1.05 * perplexity(name, held_out, 64)


@pytest.mark.parametrize(("name", "reach"), [("clex", 2048), ("gene", 2048)])
def test_bundled_models_are_scaled_models(name, reach):
    model, tokenizer = load(f"bundled:{name}")
    assert isinstance(model, ScaledModel)
    assert (model.scaling.trained_length, model.reach) == (64, reach)
    assert model.scale_at(2048) == 32
    assert tokenizer.decode(tokenizer.encode("The LORD is my shepherd;")).startswith("The LORD")


def test_an_unknown_bundled_model_is_named():
    with pytest.raises(InputError, match=r"no bundled model 'x'\. There are: base, clex, gene"):
        load("bundled:x")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_words_task_fills_the_length_and_hides_the_key(depth):
    _, tokenizer = load("bundled:base")
    for length in (20, 64, 500):
        ids, key = bundled.words_task(np.random.default_rng(0), tokenizer, length, depth)
        text = tokenizer.decode(ids)
        assert length - 120 < len(ids) <= length
        assert bundled.statement(key) in text
        assert text.endswith(bundled.QUESTION)


def test_a_words_task_without_room_is_refused():
    _, tokenizer = load("bundled:base")
    with pytest.raises(ValueError, match=r"the prompt needs \d+ tokens without filler"):
        bundled.words_task(np.random.default_rng(0), tokenizer, 10, 0.5)


def test_the_bundled_models_can_be_made(tmp_path, monkeypatch):
    """The command runs with a few steps instead of thousands."""
    monkeypatch.setattr(make, "BASE", make.BASE | {"iters": 2})
    monkeypatch.setattr(make, "LESSONS", make.LESSONS | {"iters": 1, "batch_size": 2})
    tunes = {name: training | {"iters": 1} for name, training in make._FINE_TUNES.items()}
    monkeypatch.setattr(make, "_FINE_TUNES", tunes)
    monkeypatch.setattr(make, "_LONGER", make._LONGER | {"iters": 1, "max_seq_length": 128})
    monkeypatch.setattr(make, "_KEYS", 5)
    small = {"batch_size": 2, "val_batches": 1}
    monkeypatch.setattr(make, "TRAINING", make.TRAINING | small)

    make.run(make.argparse.Namespace(work=tmp_path))

    config = json.loads((tmp_path / "bundled" / "clex" / "config.json").read_text())
    assert config["rope_scaling"]["type"] == "clex"
    assert (tmp_path / "bundled" / "base" / "model.safetensors").exists()
