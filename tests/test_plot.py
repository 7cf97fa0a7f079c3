"""The plot command: from files and models to pictures."""

import argparse
import json
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_clex import plot
from mlx_clex.checkpoint.config import SHIM
from mlx_clex.evaluation.results import open_results
from mlx_clex.loading import load, load_scaling

from .conftest import CONFIGS, stock_folder
from .pictures.rows import ROWS, log


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Run the command in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        capsys.readouterr()  # of conversions meanwhile
        try:
            status = plot.main([str(arg) for arg in args])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def drawn(monkeypatch):
    """Rows that are drawn, without the time that drawing takes."""
    rows = []
    monkeypatch.setattr(plot, "draw", lambda results, path: rows.extend(results.rows))
    return rows


def write(prefix, kind, rows=None):
    results = open_results(prefix, kind=kind, settings={}, keys=("length",))
    for number, row in enumerate(rows or ROWS[kind](), 1):
        results.rows.append({"length": number, **row})
    results.write()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("extrapolation", "perplexity"), ("passkey", "passkey"), ("compare", "compare")],
)
def test_a_result_file(cli, tmp_path, name, kind):
    """Beside the file, or where --output says."""
    write(tmp_path / "run-0.5", kind)
    assert cli(name, "run-0.5.json")[:2] == (0, "Wrote run-0.5.png.\n")
    assert (tmp_path / "run-0.5.png").stat().st_size > 5_000
    assert cli(name, "run-0.5", "--output", "new/a.svg")[:2] == (0, "Wrote new/a.svg.\n")
    assert (tmp_path / "new" / "a.svg").read_text().startswith("<?xml")


def test_several_files_in_one_picture(cli, tmp_path, drawn):
    """A label that two files have says which file it is of."""
    write(tmp_path / "a", "perplexity", [{"label": "base"}, {"label": "clex"}])
    write(tmp_path / "b", "perplexity", [{"label": "base"}, {"label": "gene"}])
    assert cli("extrapolation", "a.json", "b")[0] == 0
    assert [row["label"] for row in drawn] == ["base (a)", "clex", "base (b)", "gene"]


def test_a_training_run(cli, tmp_path):
    """By its folder or by the log in it."""
    (tmp_path / "adapters").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in log())
    (tmp_path / "adapters" / "log.jsonl").write_text(text + '{"iteration": 61, "lo')
    assert cli("training", "adapters")[:2] == (0, "Wrote adapters/log.png.\n")
    assert cli("training", "adapters/log.jsonl", "--output", "a.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "adapters" / "log.png").read_bytes()


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        (None, "Training run adapters"),
        (
            {"data": "texts", "model": "models/mine", "rope_scaling": {"type": "yarn"}},
            "texts: training of mine with yarn scaling",
        ),
        ({"data": "texts", "model": "bundled:clex"}, "texts: training of clex"),
    ],
)
def test_the_title_of_a_training_run(cli, tmp_path, monkeypatch, settings, title):
    """The log does not say what was trained on what; the settings beside it do."""
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "log.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    if settings is not None:
        (adapters / "adapter_config.json").write_text(json.dumps(settings))
    seen = []
    monkeypatch.setattr(plot, "draw_training", lambda log, path, title: seen.append(title))
    assert cli("training", "adapters")[0] == 0
    assert seen == [title]


@pytest.mark.parametrize("name", ["extrapolation", "passkey", "compare", "frequencies", "training"])
def test_help_of_each_picture_ends_with_an_example(cli, name):
    """The example is a command line that the parser takes."""
    status, out, _ = cli(name, "--help")
    *_, heading, example = out.rstrip().splitlines()
    assert (status, heading) == (0, "example:")
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    program, command, *arguments = example.split()
    assert (program, command) == ("mlx_clex", "plot")
    assert parser.parse_args(arguments).picture == name


def test_frequencies_of_models(cli, converted, monkeypatch):
    """Those of the model that generates, under the names of the folders."""
    seen = {}
    monkeypatch.setattr(plot, "draw_frequencies", lambda scalings, *_: seen.update(scalings))
    names = ("clex_llama", "gene_param_llama")
    assert cli("frequencies", "--model", *map(converted, names))[0] == 0
    assert tuple(seen) == names
    for name, scaling in seen.items():
        model, _ = load(converted(name))
        assert (scaling.inv_freq(4.0, 1) == model.scaling.inv_freq(4.0, 1)).all()


def test_frequencies_are_drawn(cli, converted, tmp_path):
    """Up to the reach unless told otherwise."""
    status, out, _ = cli("frequencies", "--model", converted("clex_llama"), "--max-scale", 3.5)
    assert (status, out) == (0, "Wrote frequencies.png.\n")
    assert (tmp_path / "frequencies.png").stat().st_size > 5_000


def test_a_scaling_without_the_weights(tmp_path, converted):
    """A picture of a 7B model read 14 GB."""
    folder = stock_folder(
        tmp_path,
        converted("clex_llama"),
        vocab_size=50_000,
        rope_scaling={"type": "clex", **CONFIGS["clex"]},
        model_file=SHIM,
    )
    weights = mx.load(str(folder / "model.safetensors"))
    hidden = mx.full((32, 16), 0.01)
    learned = {"scaling.up_proj": hidden.T, "scaling.down_proj": hidden}
    mx.save_safetensors(str(folder / "model.safetensors"), {**weights, **learned})
    del weights
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    scaling = load_scaling(folder)
    assert mx.get_peak_memory() - before < 1e6
    assert np.allclose(scaling.down_proj, 0.01)


def test_the_scaling_of_adapters(tmp_path, converted):
    """The frequencies are theirs, not the base model's."""
    folder = converted("clex_llama")
    learned = load_scaling(folder)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    none = {"rank": 8, "scale": 1.0, "dropout": 0.0, "keys": []}
    settings = {"fine_tune_type": "scaling", "num_layers": 2, "lora_parameters": none}
    (adapters / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(adapters / "adapters.safetensors"), {})
    changed = {"up_proj": learned.up_proj * 2, "down_proj": learned.down_proj}
    named = {f"scaling.{name}": array for name, array in changed.items()}
    mx.save_safetensors(str(adapters / "scaling.safetensors"), named)
    assert (load_scaling(folder, adapters).up_proj == 2 * learned.up_proj).all()


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((), "PICTURE"),
        (("extrapolation", "nowhere"), "nowhere.json cannot be read"),
        (("extrapolation", "passkeys"), "has results of passkey. Give results of perplexity"),
        (("extrapolation", "passkeys", "--output", "a.pdf"), ".png or .svg file, not 'a.pdf'"),
        (("passkey", "text.txt"), "text.txt.json cannot be read"),
        (("passkey", "no"), "no.json is not a result file"),
        (("passkey", "empty"), "lack accuracy"),
        (("compare", "a", "b"), "unrecognized arguments"),
        (("training", "nowhere"), "--adapter-path of a mlx_clex lora run"),
        (("training", "text.txt"), "no log of mlx_clex lora"),
        (("training", "no.json"), "no log of mlx_clex lora"),
        (("frequencies", "--model", "/nowhere"), "no folder or file"),
        (("frequencies", "--model", "MODEL", "--max-scale", "1"), "greater than 1, got 1"),
        (("frequencies", "--model", "MODEL", "--max-scale", "9"), "within 1..8"),
        (("frequencies", "--model", "MODEL", "x", "--adapter-path", "a"), "a single --model"),
        (("frequencies", "--model", "STOCK"), "so it has no scaling"),
    ],
)
def test_bad_input_is_one_line(cli, tmp_path, converted, args, match):
    """Exit 2, and no picture."""
    write(tmp_path / "passkeys", "passkey")
    write(tmp_path / "empty", "passkey", [{"label": "a"}])
    (tmp_path / "text.txt").write_text("text\n")
    (tmp_path / "no.json").write_text("[1, 2]\n")
    models = {"MODEL": str(converted("clex_llama"))}
    if "STOCK" in args:
        models["STOCK"] = str(stock_folder(tmp_path, converted("clex_llama")))
    status, _, err = cli(*(models.get(arg, arg) for arg in args))
    assert status == 2
    # Before it, a note on the curve of the model, whose weights are random.
    *_, line = err.splitlines()
    assert match in line
    assert not [*tmp_path.glob("*.png"), *tmp_path.glob("*.pdf")]


def test_without_matplotlib_nothing_is_read(cli, monkeypatch):
    """The missing extra is named before a model is loaded."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = cli("frequencies", "--model", "nowhere")
    assert status == 2
    assert "pip install 'mlx-clex[plot]'" in err


def test_files_of_one_name_keep_their_models_apart(cli, tmp_path, drawn):
    """run1/p.json and run2/p.json gave one line through both models."""
    for folder in ("run1", "run2"):
        write(tmp_path / folder / "p", "perplexity", [{"label": "base"}])
    assert cli("extrapolation", "run1/p.json", "run2/p")[0] == 0
    assert [row["label"] for row in drawn] == ["base (run1/p.json)", "base (run2/p)"]


@pytest.mark.parametrize("name", ["targets", "longest", "texts", "windows", "chunk", "stride"])
def test_figures_of_other_targets_are_not_drawn_together(cli, tmp_path, name):
    """They were drawn under "the same targets at every length"."""
    for value in (64, 128):
        settings = {"protocol": "same-targets", "tokens": "same", name: value}
        results = open_results(
            tmp_path / str(value), kind="perplexity", settings=settings, keys=("label", "length")
        )
        results.add({"label": "m", "length": 64, "perplexity": 2.0})
    status, _, err = cli("extrapolation", "64.json", "128.json", "--output", "both.svg")
    assert (status, f"differ in their {name} (64 in" in err) == (2, True)


def test_figures_that_do_not_compare_are_not_drawn_together(cli, tmp_path):
    """One picture of two protocols, under the name of the first."""
    for name in ("whole", "chunked"):
        settings = {"protocol": name, "tokens": "same"}
        results = open_results(
            tmp_path / name, kind="perplexity", settings=settings, keys=("label", "length")
        )
        results.add({"label": "m", "length": 64, "perplexity": 2.0})
    status, _, err = cli("extrapolation", "whole.json", "chunked.json", "--output", "both.svg")
    assert status == 2
    assert "differ in their protocol (whole in" in err
    assert "chunked in" in err
    assert not (tmp_path / "both.svg").exists()
