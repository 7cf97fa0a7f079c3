"""What a run is refused for before it starts, and what it is prepared with."""

import json
import re
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_clex import load
from mlx_clex.errors import InputError
from mlx_clex.scaling.gene import GeneParam
from mlx_clex.training import prepare
from mlx_clex.training.log import read_log
from mlx_clex.training.setup import build_optimizer

from ..conftest import GOLDEN, stock_folder
from .commands import WORDS, argv_for, call, options

pytestmark = pytest.mark.usefixtures("eager")


def test_a_base_without_a_scaling_gets_one(texts, tmp_path):
    """Its adapters bring the scaling along, also when it is held at a scale."""
    folder = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    for name in (
        "clex --max-factor 4 --scaling-learning-rate 1e-5",
        "gene --factor 4 --training-seq-len 32",
        "none",
    ):
        adapters = tmp_path / name.split()[0]
        more = f"--iters 2 --scaling {name} --trained-length 32"
        assert call(argv_for(folder, texts, adapters, more)) == 0
        model, _ = load(folder, adapter_path=adapters)
        assert model.scaling.trained_length == 32
    model, _ = load(folder, adapter_path=tmp_path / "clex", scale=3)
    assert model.fixed_scale == 3
    assert model.scaling.config.max_factor == 4
    assert mx.abs(model.scaling.down_proj).max().item() > 0


@pytest.mark.parametrize("name", ["scaling.safetensors", "norms_embeddings.safetensors"])
def test_adapters_without_a_trained_part_are_refused(base, texts, tmp_path, name):
    """They would load, and answer wrongly."""
    adapters = tmp_path / "a"
    more = "--iters 1 --train-norms-and-embeddings --scaling-learning-rate 1e-5"
    assert call(argv_for(base, texts, adapters, more)) == 0
    load(base, adapter_path=adapters)
    (adapters / "current").resolve().joinpath(name).unlink()
    with pytest.raises(InputError, match=f"lacks {name}"):
        load(base, adapter_path=adapters)


def test_adapters_on_another_base_are_told(base, converted, texts, tmp_path, capsys):
    """Adapters of a base, put on its fine-tune, are applied twice; nothing else would tell."""
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 1")) == 0
    capsys.readouterr()
    load(base, adapter_path=tmp_path / "a")
    assert "were trained on" not in capsys.readouterr().err
    shutil.copytree(base, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    arrays_of = mx.load(str(weights))
    name = sorted(arrays_of)[0]
    mx.save_safetensors(str(weights), arrays_of | {name: arrays_of[name] + 1}, {"format": "mlx"})
    load(tmp_path / "other", adapter_path=tmp_path / "a")
    assert "were trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "length", "why"),
    [
        ("", 128, "4 trained lengths, which measured best"),
        ("--sampling contiguous", 256, "the scaling allows no more"),
    ],
)
def test_the_default_length_is_one_that_can_be_trained(
    base, texts, tmp_path, capsys, more, length, why
):
    """The default of 2,048 tokens was refused by a scaling that reaches fewer."""
    argv = argv_for(base, texts, tmp_path / "a", f"--iters 1 {more}")
    at = argv.index("--max-seq-length")
    assert call([*argv[:at], *argv[at + 2 :], "--batch-size", "1"]) == 0
    assert f"--max-seq-length is {length} tokens: {why}" in capsys.readouterr().err
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["max_seq_length"] == length


def test_the_network_learns_at_its_own_rate(base, texts, tmp_path):
    """--scaling-learning-rate 0 leaves it as it was, and no file for it."""
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2 --scaling-learning-rate 0")) == 0
    assert not (tmp_path / "a" / "scaling.safetensors").exists()
    moved = {}
    for rate in ("1e-2", "1e-4"):
        adapters = tmp_path / rate
        assert (
            call(argv_for(base, texts, adapters, f"--iters 4 --scaling-learning-rate {rate}")) == 0
        )
        after = mx.load(str(adapters / "scaling.safetensors"))["scaling.down_proj"]
        moved[rate] = mx.abs(after - load(base)[0].scaling.down_proj).max().item()
    assert 20 < moved["1e-2"] / moved["1e-4"] < 500


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("--iters 0", "--iters must be at least 1"),
        ("--max-seq-length 320", "beyond 256 tokens"),
        ("--max-seq-length 200 --sampling release --packing plain --batch-size 9", "fewer than"),
        ("--eval-lengths 300", "300 tokens, and this model reaches 256"),
        ("--scaling clex", "weights of its own"),
        ("--trained-length 5", "needs --scaling"),
        ("--max-factor 5", "needs --scaling"),
        ("--mask-prompt", "no prompts"),
        ("--plain-share 2", "--plain-share"),
        (
            "--plain-share 0.5 --sampling contiguous",
            "is for --sampling skips and cream, not contiguous",
        ),
        ("--num-layers 0", "--num-layers must be at least 1, or -1"),
        ("--num-layers -2", "--num-layers must be at least 1, or -1 for all, got -2"),
        ("--val-batches -5", "--val-batches must be at least 0, or -1 for all, got -5"),
        ("--test --test-batches 0", "--test-batches must be at least 1"),
        ("--resume-adapter-file nowhere.safetensors", "does not load"),
        ("--report-to nothing", "--report-to nothing"),
    ],
)
def test_bad_options_are_one_line(base, texts, tmp_path, more, match, capsys):
    """Exit 2, nothing written."""
    assert call(argv_for(base, texts, tmp_path / "a", more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert match in error
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("model", "train", "more", "match"),
    [
        ("clex_llama", None, "", "has no data. Give a folder with train.jsonl"),
        ("clex_llama", '{"text": "a few words"}', "", "texts (train) has "),
        ("clex_llama", '{"text": "a"}\n{"text": ', "", "train.jsonl, line 2 is not JSON"),
        ("clex_llama", '{"words": "a"}', "", "train.jsonl, line 1 cannot be used"),
        ("gene_llama", WORDS * 40, "--max-seq-length 576", "576 is beyond 512 tokens"),
        ("clex_llama", WORDS * 40, "--test", "has no test part"),
        ("clex_llama", WORDS * 40, "--eval-lengths 200", "too few for a length of 200"),
        (
            "clex_llama",
            WORDS * 400,
            "--eval-lengths 16 64",
            "16 is below the trained length",
        ),
    ],
)
def test_bad_data_is_one_line(converted, tmp_path, model, train, more, match, capsys):
    """File, line and length are named, and nothing is written."""
    (tmp_path / "texts").mkdir()
    if train is not None:
        text = train if train.startswith("{") else json.dumps({"text": train})
        (tmp_path / "texts" / "train.jsonl").write_text(text)
        (tmp_path / "texts" / "valid.jsonl").write_text(json.dumps({"text": WORDS * 3}))
    argv = argv_for(converted(model), tmp_path / "texts", tmp_path / "a", f"--iters 1 {more}")
    assert call(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert match in error
    assert not (tmp_path / "a").exists()


def test_a_scaling_with_nothing_to_learn_has_no_rate(converted, texts, tmp_path, capsys):
    """It was taken, and did nothing."""
    more = "--iters 1 --scaling-learning-rate 1e-3"
    assert call(argv_for(converted("gene_llama"), texts, tmp_path / "a", more)) == 2
    assert "gene has nothing to learn" in capsys.readouterr().err


def test_a_scaling_is_tested_only_without_adapters(converted, tmp_path, capsys):
    """--scaling was silently ignored where nothing is trained."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "test.jsonl").write_text(json.dumps({"text": WORDS * 40}) + "\n")
    argv = ["--test", "--model", str(converted("gene_llama")), "--data", str(tmp_path / "texts")]
    argv += ["--batch-size", "1", "--max-seq-length", "64"]
    assert call([*argv, "--scaling", "ntk", "--adapter-path", "somewhere"]) == 2
    assert "--adapter-path ''" in capsys.readouterr().err
    losses = set()
    for more in ([], ["--scaling", "ntk", "--factor", "16"]):
        assert call([*argv, *more, "--adapter-path", ""]) == 0
        losses.add(capsys.readouterr().out.splitlines()[-1])
    assert len(losses) == 2


def test_a_plain_model_is_tested_as_it_is(tmp_path, capsys):
    """With adapters of mlx-lm there was no way: each message led to the other."""
    folder = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    stock = ["--train", "--iters", "1", "--batch-size", "1", "--num-layers", "1"]
    rows = tmp_path / "rows"
    rows.mkdir()
    for part in ("train", "valid", "test"):
        (rows / f"{part}.jsonl").write_text(json.dumps({"text": WORDS * 9}) + "\n")
    own = [sys.executable, "-m", "mlx_lm", "lora", "--model", str(folder), "--data", str(rows)]
    adapters = tmp_path / "adapters"
    subprocess.run([*own, *stock, "--adapter-path", str(adapters)], check=True)
    argv = ["--test", "--model", str(folder), "--data", str(rows), "--batch-size", "1"]
    argv += ["--max-seq-length", "64"]
    for path in (adapters, ""):
        assert call([*argv, "--adapter-path", str(path)]) == 0
        assert "Test loss" in capsys.readouterr().out.splitlines()[-1]


def test_what_is_held_out_and_not_measured_is_told(base, tmp_path, capsys):
    """The plan said that nothing is."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(WORDS * 60)
    more = "--iters 1 --val-batches 0"
    assert call(argv_for(base, tmp_path / "texts", tmp_path / "a", more)) == 0
    assert re.search(r"held out: +the last 5 % of .* tokens; not measured", capsys.readouterr().out)


@pytest.mark.parametrize(("more", "share"), [("", 0.25), ("--plain-share 0", 0)])
def test_a_plain_share_of_none_is_taken(base, more, share):
    """0 is a choice, not the lack of one."""
    model, _ = load(base)
    draws = prepare._draws(options(*more.split()), model)
    assert draws.procedure.plain_share == share


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ("--fine-tune-type full", 0.0),
        ("--release-recipe", 1.0),
        ("--fine-tune-type scaling", 1.0),
        ("--scaling-learning-rate 1e-4", 0.1),
    ],
)
def test_the_learning_rate_of_the_scaling(base, texts, tmp_path, monkeypatch, options, share):
    """CLEX's network is trained only alone, as published or when asked for."""
    seen = []

    def build(*args, scaling_share):
        seen.append(scaling_share)
        return build_optimizer(*args, scaling_share=scaling_share)

    monkeypatch.setattr(prepare, "build_optimizer", build)
    assert call(argv_for(base, texts, tmp_path / "a", f"--iters 1 {options}")) == 0
    assert seen == [pytest.approx(share)]
    assert GeneParam.learning_rate_share == 1


def test_a_schedule_has_the_rate_that_the_scaling_is_held_against(base, texts, tmp_path, capsys):
    """The share was of --learning-rate, which a schedule leaves unused."""
    config = tmp_path / "c.yaml"
    for arguments, status in (("[0.01, 100]", 0), ("[]", 2)):
        config.write_text(f"lr_schedule: {{name: cosine_decay, arguments: {arguments}}}\n")
        more = f"--iters 1 --scaling-learning-rate 0.001 -c {config}"
        assert call(argv_for(base, texts, tmp_path / f"a{status}", more)) == status
    assert "lr_schedule cannot be used" in capsys.readouterr().err


def test_a_rising_schedule_gives_the_scaling_its_rate_at_the_top(
    base, texts, tmp_path, monkeypatch
):
    """The share was of its first rate, so the network was trained at a thousand times the rate."""
    seen = []
    monkeypatch.setattr(
        prepare,
        "build_optimizer",
        lambda *args, scaling_share: (
            seen.append(scaling_share) or build_optimizer(*args, scaling_share=scaling_share)
        ),
    )
    config = tmp_path / "c.yaml"
    config.write_text("lr_schedule: {name: linear_schedule, arguments: [0.0, 0.01, 3]}\n")
    more = f"--iters 4 --scaling-learning-rate 0.001 -c {config}"
    assert call(argv_for(base, texts, tmp_path / "a", more)) == 0
    assert seen == [pytest.approx(0.1)]


def test_the_scalings_rate_is_told_where_it_trains_alone(base, texts, tmp_path):
    """The log had the rate of an optimizer that trained nothing."""
    more = "--iters 1 --fine-tune-type scaling --scaling-learning-rate 0.0625"
    assert call(argv_for(base, texts, tmp_path / "a", more)) == 0
    rates = [line.get("learning_rate") for line in read_log(tmp_path / "a" / "log.jsonl")]
    assert 0.0625 in rates
    assert 1e-3 not in rates


def test_perplexity_by_length_needs_no_batches_of_validation(base, texts, tmp_path, capsys):
    """--val-batches 0 silently switched off --eval-lengths and --keep-best."""
    more = "--iters 1 --val-batches 0 --keep-best --eval-lengths 32 64"
    assert call(argv_for(base, texts, tmp_path / "a", more)) == 0
    out = capsys.readouterr().out
    assert "Iter 0: The best at long lengths so far." in out
    assert "Val loss" not in out


def test_the_best_weights_of_a_half_precision_model_are_kept(base, texts, tmp_path):
    """NumPy has no bfloat16, which ended the run at its first validation."""
    folder = tmp_path / "half"
    shutil.copytree(base, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    half = {
        name: value if name.startswith("scaling.") else value.astype(mx.bfloat16)
        for name, value in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), half, {"format": "mlx"})
    more = "--iters 1 --fine-tune-type full --keep-best --eval-lengths 32 64"
    assert call(argv_for(folder, texts, tmp_path / "a", more)) == 0
    saved = mx.load(str(tmp_path / "a" / "current" / "best.safetensors"))
    assert mx.bfloat16 in {value.dtype for value in saved.values()}
