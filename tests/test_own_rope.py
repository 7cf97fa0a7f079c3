"""--own-rope in convert, lora, fuse and perplexity: one model, however it was made."""

import json

import mlx.core as mx
import pytest
from mlx_clex.convert import convert

from mlx_clex import attach, doctor, fuse, load, lora, perplexity
from mlx_clex.errors import InputError
from mlx_clex.model.own_rope import dropped_rope, original_length

from .conftest import GOLDEN, stock_folder
from .tiny_families import tiny

IDS = mx.arange(3, 40)[None]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"type": "longrope", "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Return a small Llama 3.1: trained at 64 tokens, stretched to 256."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick brown fox runs away . " * 60)
    mx.disable_compile()
    config = {"vocab_size": 512, "max_position_embeddings": 256, "rope_scaling": LLAMA3}
    yield stock_folder(tmp_path, GOLDEN / "clex_llama", **config)
    mx.enable_compile()


WARNING = (
    "--own-rope drop replaces the model's rope (llama3) by a plain rope trained at 64 tokens. "
    "Short texts change, and training is needed."
)


def call(command, *argv):
    return command.main([str(arg) for arg in argv])


def test_doctor_says_what_dropping_does(source, capsys):
    """It named the length alone; a user dropped the rope and had another model, untrained."""
    call(doctor, source)
    assert WARNING in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("choice", "length"), [("keep", 256), ("drop", 64), (None, 256)])
def test_every_command_starts_from_the_same_model(choice, length, source, tmp_path, capsys):
    """lora and perplexity could not drop the rope of a Llama 3, convert could."""
    option = [] if choice is None else ["--own-rope", choice]
    adapters = tmp_path / "adapters"
    made = convert(source, tmp_path / "made", scaling={"type": "clex"}, own_rope=choice)
    there, _ = load(made)
    here = attach(load(source)[0], {"type": "clex"}, own_rope=choice)
    assert here.trained_length == there.trained_length == length
    assert mx.array_equal(here(IDS), there(IDS))

    texts = tmp_path / "texts"
    steps = ["--train", "--scaling", "clex", "--iters", "1", "--batch-size", "1"]
    where = ["--model", source, "--data", texts, "--adapter-path", adapters]
    steps += ["--max-seq-length", "32"]
    capsys.readouterr()
    assert call(lora, *steps, *where, *option) == 0
    told = int(choice == "drop")
    assert capsys.readouterr().err.count(WARNING) == told
    tuned, _ = load(source, adapter_path=adapters)
    target = tmp_path / "fused"
    assert call(fuse, *where[:2], *where[4:], "--save-path", target) == 0
    fused, _ = load(target)
    assert fused.trained_length == tuned.trained_length == length
    assert mx.abs(fused(IDS) - tuned(IDS)).max() < 1e-4
    assert mx.abs(tuned(IDS) - here(IDS)).max() < 0.1, "one small step from the same model"

    capsys.readouterr()
    settings = ["--data", texts, "--protocol", "whole", "--lengths", 48, "--windows", 2, "--json"]
    assert call(perplexity, "--model", source, "--scalings", "none", *settings, *option) == 0
    printed = capsys.readouterr()
    assert printed.err.count(WARNING) == told
    measured = json.loads(printed.out)["results"][0]["perplexity"]
    plain = convert(source, tmp_path / "plain", scaling={"type": "none"}, own_rope=choice)
    assert call(perplexity, "--model", plain, *settings) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert measured == pytest.approx(row["perplexity"], rel=1e-5)


def test_a_longrope_is_dropped_for_every_scaling(tmp_path, capsys):
    """The second scaling was refused for a trained length that nobody had given."""
    wide = LONGROPE | {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    config = {"vocab_size": 512, "max_position_embeddings": 256, "rope_scaling": wide}
    source = stock_folder(tmp_path, GOLDEN / "clex_llama", **config)
    (tmp_path / "a.txt").write_text("the quick brown fox runs away . " * 60)
    settings = ["--data", tmp_path / "a.txt", "--lengths", 64, 128, "--windows", 1, "--json"]
    methods = ["--scalings", "none", "clex", "--own-rope", "drop"]
    assert call(perplexity, "--model", source, *methods, *settings) == 0
    plain, clex = json.loads(capsys.readouterr().out)["results"][::2]
    assert plain["perplexity"] == pytest.approx(clex["perplexity"], rel=1e-5)  # at scale 1


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_the_option_is_refused_where_it_has_no_effect(choice, source, tmp_path, capsys):
    """On a plain rope, and without a scaling."""
    option = ("--own-rope", choice)
    data = ("--data", tmp_path / "texts")
    assert call(lora, "--train", "--model", source, *data, *option) == 2
    assert "--own-rope needs --scaling" in capsys.readouterr().err
    assert call(perplexity, "--model", source, *data, *option) == 2
    assert "--own-rope needs --scalings" in capsys.readouterr().err
    bundled = ("--model", "bundled:base", *data, *option)
    for command, more in ((lora, ("--train", "--scaling", "clex")), (perplexity, ())):
        methods = more or ("--scalings", "clex")
        assert call(command, *bundled, *methods) == 2
        assert f"--own-rope {choice}: the source has a plain rope" in capsys.readouterr().err


def test_a_rope_that_was_dropped_stays_dropped(source, tmp_path):
    """A converted folder keeps the source's rope beside the scaling, and fuse put it back."""
    kept = convert(source, tmp_path / "kept", scaling={"type": "gene", "factor": 4})
    adapters, texts = tmp_path / "adapters", tmp_path / "texts"
    where = ["--model", kept, "--adapter-path", adapters]
    steps = ["--train", "--iters", "1", "--batch-size", "1", "--max-seq-length", "32"]
    scaling = ["--scaling", "ntk", "--factor", "4", "--own-rope", "drop"]
    assert call(lora, *where, *steps, "--data", texts, *scaling) == 0
    tuned, _ = load(kept, adapter_path=adapters)
    assert call(fuse, *where, "--save-path", tmp_path / "fused") == 0
    fused, _ = load(tmp_path / "fused")
    assert mx.abs(fused(IDS) - tuned(IDS)).max() < 1e-4


def test_the_length_of_a_rope_with_a_gain_stays(tmp_path):
    """longrope takes its gain from the length, so another length is another rope."""
    model = tiny("phi3", rope_scaling=LONGROPE, max_position_embeddings=256)
    match = "--trained-length 128: the gain of the source's own rope"
    with pytest.raises(InputError, match=match):
        attach(model, {"type": "ntk", "factor": 2}, trained_length=128)
    attach(model, {"type": "ntk", "factor": 2}, trained_length=256)


def test_a_dynamic_rope_was_trained_at_the_length_of_its_config():
    """It was taken for a stretched one: 5,461 tokens instead of 32,768, all scales six times."""
    config = {"max_position_embeddings": 32768, "rope_scaling": {"type": "dynamic", "factor": 6.0}}

    assert original_length(config) == 32768
    assert "Short texts change" not in str(dropped_rope(config))
