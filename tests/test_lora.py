"""The fine-tuning command: runs, saves, resumes, refuses."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_clex import load, lora
from mlx_clex.commands.run_command import run_command
from mlx_clex.errors import InputError, RunError
from mlx_clex.scaling import build_scaling
from mlx_clex.scaling.gene import GeneParam
from mlx_clex.training import prepare
from mlx_clex.training.draws import Draws, procedure_for
from mlx_clex.training.log import Log, read_log
from mlx_clex.training.option_fields import with_config
from mlx_clex.training.options import TrainingOptions
from mlx_clex.training.ranks import Ranks
from mlx_clex.training.saves import Checkpoints
from mlx_clex.training.setup import OPTIMIZERS, build_optimizer
from mlx_clex.training.step import TrainingStep

from .conftest import GOLDEN, stock_folder

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = "the quick brown fox jumps over the lazy dog and runs away from it all . "


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home directory for the cache of tokens."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with train and valid texts."""
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 60), ("valid", 40), ("test", 20)):
        (folder / split).mkdir()
        (folder / split / "a.txt").write_text(WORDS * count)
    return folder


@pytest.fixture(autouse=True)
def _at_home(home, monkeypatch):
    """Without compiling, which takes a C++ compiler seconds a kernel on the CPU."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # in processes started here
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def base(converted):
    """A converted CLEX checkpoint: L0 32, max_factor 8."""
    return converted("clex_llama")


def argv_for(model, texts, adapters, *more):
    options = f"--batch-size 2 --max-seq-length 32 --num-layers 2 --learning-rate 1e-3 {more[0]}"
    paths = ["--model", str(model), "--data", str(texts), "--adapter-path", str(adapters)]
    return ["--train", *paths, *options.split(), *more[1:]]


def call(argv):
    return run_command(
        lora.add_arguments, lora.run, prog="mlx_clex.lora", description="", argv=argv
    )


def whole_parser():
    parser = argparse.ArgumentParser()
    lora.add_arguments(parser)
    return parser


def parse(*argv):
    return with_config(whole_parser().parse_args(list(argv)), TrainingOptions)


def arrays(folder):
    names = ("adapters.safetensors", "scaling.safetensors", "norms_embeddings.safetensors")
    return {name: mx.load(str(folder / name)) for name in names if (folder / name).is_file()}


def equal(one, two):
    return one.keys() == two.keys() and all(
        one[name].keys() == two[name].keys()
        and all(mx.array_equal(one[name][key], two[name][key]).item() for key in one[name])
        for name in one
    )


def test_a_run_trains_reports_and_saves(base, texts, tmp_path, capsys):
    """Losses fall, perplexities by length are printed, and adapters change the answers."""
    mx.enable_compile()
    adapters = tmp_path / "adapters"
    more = "--iters 30 --save-every 15 --steps-per-eval 30 --eval-lengths 32 64 --grad-checkpoint"
    assert call(argv_for(base, texts, adapters, more, "--test")) == 0

    lines = read_log(adapters / "log.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in steps] == list(range(1, 31))
    assert sum(line["loss"] for line in steps[-5:]) < sum(line["loss"] for line in steps[:5])
    assert len({line["scale"] for line in steps}) > 3
    assert steps[-1]["learning_rate"] == pytest.approx(1e-3)
    assert steps[-1]["tokens"] == 30 * 2 * 32
    first, last = (line for line in lines if "valid_loss" in line)
    assert (first["iteration"], last["iteration"]) == (0, 30)
    assert last["valid_loss"] < first["valid_loss"]
    assert last["perplexity"].keys() == {"32", "64"}
    printed = capsys.readouterr().out
    assert "Iter 30: Train loss" in printed
    assert "Iter 30: Perplexity at 32 tokens" in printed
    assert "Test ppl" in printed
    saves = sorted(path.name for path in (adapters / "checkpoints").iterdir())
    assert saves == ["0000015", "0000030"]
    before, after = load(base)[0], load(base, adapter_path=adapters)[0]
    ids = mx.arange(40)[None]
    assert mx.abs(before(ids) - after(ids)).max().item() > 0
    assert not mx.array_equal(before.scaling.down_proj, after.scaling.down_proj)


def test_stock_mlx_lm_reads_the_adapters(base, texts, tmp_path):
    """Its loader refuses every leaf it does not know."""
    from mlx_lm.tuner.utils import load_adapters

    for kind in ("lora", "dora", "scaling", "full"):
        adapters = tmp_path / kind
        assert call(argv_for(base, texts, adapters, f"--iters 1 --fine-tune-type {kind}")) == 0
        model = load(base)[0]
        load_adapters(model, str(adapters))
        assert (adapters / "scaling.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ("--optimizer adamw --warmup 2 --cosine --max-grad-norm 1", "clex_llama"),
        (
            "--grad-accumulation-steps 3 --train-norms-and-embeddings --grad-checkpoint",
            "gene_llama",
        ),
        ("--sampling skips --fine-tune-type full --packing plain --batch-size 1", "clex_phi"),
    ],
)
def test_resuming_is_bit_identical(more, name, converted, texts, tmp_path):
    """Weights and every loss, with dropout, accumulation and a schedule."""
    model, whole, parts = converted(name), tmp_path / "whole", tmp_path / "parts"
    config = tmp_path / "config.yaml"
    dropout = 0.0 if "checkpoint" in more else 0.1
    rank = {"rank": 4, "scale": 10.0, "dropout": dropout}
    config.write_text(yaml.safe_dump({"lora_parameters": rank, "save_every": 4}))
    more = f"{more} --iters 14 -c {config}"
    assert call(argv_for(model, texts, whole, more)) == 0
    step = TrainingStep.__call__
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt  # as a kill would, in the middle of a step
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingStep, "__call__", interrupted)
        assert call(argv_for(model, texts, parts, more)) == 130
    assert call(argv_for(model, texts, parts, more, "--resume")) == 0
    assert read_log(whole / "log.jsonl") == read_log(parts / "log.jsonl")
    assert equal(arrays(whole), arrays(parts))


def start(argv, home, texts):
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_clex.lora", *argv],
        env=os.environ | {"HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def last_iteration(adapters):
    return max((line["iteration"] for line in read_log(adapters / "log.jsonl")), default=0)


def wait_for(adapters, iteration):
    deadline = time.monotonic() + 60
    while last_iteration(adapters) < iteration:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def test_killed_and_interrupted_processes_go_on(base, texts, tmp_path, home):
    """SIGKILL at any moment, then Ctrl-C, then to the end: as if nothing had been."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = "--iters 40 --save-every 3"
    assert call(argv_for(base, texts, whole, more)) == 0

    killed = start(argv_for(base, texts, parts, more), home, texts)
    wait_for(parts, 8)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    newest = Checkpoints(parts, keep=2).newest
    assert newest is not None
    load(base, adapter_path=parts)

    before = int(newest.name)
    stopped = start(argv_for(base, texts, parts, more, "--resume"), home, texts)
    wait_for(parts, before + 5)
    stopped.send_signal(signal.SIGINT)
    out, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, out
    assert f"Going on after iteration {before}" in out
    at = int(Checkpoints(parts, keep=2).newest.name)
    assert at == last_iteration(parts)

    assert call(argv_for(base, texts, parts, more, "--resume")) == 0
    assert read_log(whole / "log.jsonl") == read_log(parts / "log.jsonl")
    assert equal(arrays(whole), arrays(parts))


def test_the_log_of_a_run_that_starts_anew(tmp_path):
    """What a run left that was killed before its first save, and a line cut off by it."""
    path = tmp_path / "log.jsonl"
    for resumed, text, left in [
        (0, '{"iteration": 0}\n{"iteration": 1}\n', []),
        (1, '{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2}\n', [0, 1]),
        (2, '{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2}', [0, 1]),
    ]:
        path.write_text(text)
        with Log(path, resumed) as log:
            log.write({"iteration": 7})
        assert [line["iteration"] for line in read_log(path)] == [*left, 7]


def test_resume_without_a_save_and_after_the_end(base, texts, tmp_path, capsys):
    """The one starts at 0 and says so, the other has nothing to do."""
    argv = argv_for(base, texts, tmp_path / "a", "--iters 2", "--resume")
    assert call(argv) == 0
    assert "no save yet" in capsys.readouterr().err
    assert call(argv) == 0
    assert "has all 2 iterations" in capsys.readouterr().err


def test_resume_refuses_another_run(base, converted, texts, tmp_path, capsys):
    """What differs is said; starting over in the folder is refused too."""
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2")) == 0
    model = converted("clex_llama_gqa_log_scale")
    assert call(argv_for(model, texts, tmp_path / "a", "--iters 4", "--resume")) == 2
    assert "the model was" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text(WORDS * 50)
    assert call(argv_for(base, tmp_path / "other", tmp_path / "a", "--iters 4", "--resume")) == 2
    assert "the training data was" in capsys.readouterr().err
    other = argv_for(base, texts, tmp_path / "a", "--iters 4 --seed 5", "--resume")
    assert call(other) == 2
    assert "seed was 0 and is 5" in capsys.readouterr().err
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2")) == 2
    assert "go on with --resume" in capsys.readouterr().err


def test_nan_stops_and_keeps_the_last_good_save(base, texts, tmp_path, capsys):
    """Step and scale are named, and what was saved still loads."""
    adapters = tmp_path / "a"
    argv = argv_for(base, texts, adapters, "--iters 3")
    assert call(argv) == 0
    good = arrays(adapters)
    huge = "--iters 9 --save-every 1 --learning-rate 1e30 --warmup 1 --optimizer sgd"
    assert call(argv_for(base, texts, tmp_path / "b", huge)) == 1
    assert "the loss is" in capsys.readouterr().err
    newest = Checkpoints(tmp_path / "b", keep=2).newest
    for weights in arrays(newest).values():
        assert all(mx.isfinite(value).all().item() for value in weights.values())
    assert equal(good, arrays(adapters))


@pytest.mark.parametrize(
    ("rate", "kept"),
    [
        ("learning_rate: .inf", None),
        ("lr_schedule: {name: exponential_decay, arguments: [0.001, 1.0e40]}", "0000001"),
        ("learning_rate: 1.0e30\nwarmup: 1\noptimizer: sgd", "0000001"),
    ],
)
def test_a_save_follows_a_finite_forward_pass(base, texts, tmp_path, rate, kept, capsys):
    """The last update of a run was saved whatever it did, and the run ended with status 0."""
    adapters = tmp_path / "a"
    (tmp_path / "c.yaml").write_text(f"{rate}\nsave_every: 1\niters: {2 if kept else 1}\n")
    argv = argv_for(base, texts, adapters, f"-c {tmp_path / 'c.yaml'}")
    at = argv.index("--learning-rate")
    assert call(argv[:at] + argv[at + 2 :]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"Iteration {2 if kept else 1}: after its update " in error
    newest = Checkpoints(adapters, keep=2).newest
    assert (newest and newest.name) == kept
    assert (f"the last good save is {newest}" if kept else "nothing was saved yet") in error
    if kept:
        model = load(base, adapter_path=adapters)[0]
        assert mx.isfinite(model(mx.arange(40)[None])).all().item()


def test_a_failure_of_mlx_is_one_line(base, texts, tmp_path, monkeypatch, capsys):
    """Memory, above all; the last good save stays."""
    real, steps = TrainingStep.__call__, []

    def fails(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", fails)
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 4 --save-every 2")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert "MLX failed: [malloc] Unable to allocate 9 bytes. If memory was short:" in line
    newest = Checkpoints(tmp_path / "a", keep=2).newest
    assert newest is not None
    assert int(newest.name) == 2


def test_a_failure_of_mlx_names_the_process():
    """It ended in silence in all but the first."""
    second = Ranks(SimpleNamespace(size=lambda: 2, rank=lambda: 1))
    with pytest.raises(RunError, match="MLX failed in process 2 of 2: no memory"), second.running():
        raise RuntimeError("no memory")


def test_a_full_disk_leaves_the_save_before(base, texts, tmp_path, monkeypatch, capsys):
    """Exit 1, one line, and the links still lead to a whole save."""
    from mlx_clex.training import saves as checkpoints

    adapters = tmp_path / "a"
    real, writes = checkpoints.write, []

    def full(path, *args):
        writes.append(path)
        if len(writes) > 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(path, *args)

    monkeypatch.setattr(checkpoints, "write", full)
    assert call(argv_for(base, texts, adapters, "--iters 4 --save-every 1")) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in (adapters / "checkpoints").iterdir()] == ["0000001"]
    load(base, adapter_path=adapters)


def test_a_base_without_a_scaling_gets_one(texts, tmp_path):
    """Its adapters bring the scaling along, also when it is held at a scale."""
    folder = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    for name in ("clex --max-factor 4", "gene --factor 4 --training-seq-len 32", "none"):
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
    assert call(argv_for(base, texts, adapters, "--iters 1 --train-norms-and-embeddings")) == 0
    load(base, adapter_path=adapters)
    (adapters / "current").resolve().joinpath(name).unlink()
    with pytest.raises(InputError, match=f"lacks {name}"):
        load(base, adapter_path=adapters)


def test_a_run_tells_its_plan_and_what_it_made(base, texts, tmp_path, capsys):
    """The draw of scales and positions decided the result, and was not printed."""
    adapters = tmp_path / "a"
    more = "--iters 3 --grad-accumulation-steps 2 --max-seq-length 64 --eval-lengths 64"
    assert call(argv_for(base, texts, adapters, more)) == 0
    printed, progress = capsys.readouterr()
    plan, _, end = printed.partition("Iter 0: ")
    lines = dict(line.split(": ", 1) for line in plan.splitlines())
    told = {name: text.strip() for name, text in lines.items()}
    assert told["model"] == f"{base}: clex, trained length 32 tokens, reach 256 tokens"
    assert told["trained"].startswith("lora of the last 2 of 2 layers, the scaling: ")
    assert told["scale"].startswith("uniform: ")
    assert told["positions"].startswith("skips: ")
    assert told["plain steps"] == "25% of the steps, in rows of at most 32 tokens"
    assert "(valid), " in told["held out"]
    assert told["tokens"].startswith("128 an iteration (2 x 64), 384 in all, ")
    for text in ("Validating", "Perplexity at 64 tokens"):
        assert f"{text}:   0%" in progress, "shown before the first of it is done"
    assert f"the result is in {adapters}" in end
    for command in ("generate", "fuse"):
        assert f"mlx_clex {command} --model {base} --adapter-path {adapters} --" in end


def test_the_default_length_is_one_that_can_be_trained(base, texts, tmp_path, capsys):
    """The default of 2,048 tokens was refused by a scaling that reaches fewer."""
    argv = argv_for(base, texts, tmp_path / "a", "--iters 1")
    at = argv.index("--max-seq-length")
    assert call([*argv[:at], *argv[at + 2 :], "--batch-size", "1"]) == 0
    assert "--max-seq-length is 256 tokens" in capsys.readouterr().err
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["max_seq_length"] == 256


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
        ("--plain-share 0.5 --sampling contiguous", "is for --sampling skips"),
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
        ("clex_llama", None, "", "has no data: give a folder with train.jsonl"),
        ("clex_llama", '{"text": "a few words"}', "", "texts (train) has "),
        ("clex_llama", '{"text": "a"}\n{"text": ', "", "train.jsonl, line 2 is no JSON"),
        ("clex_llama", '{"words": "a"}', "", "train.jsonl, line 1 cannot be used"),
        ("gene_llama", WORDS * 40, "--max-seq-length 576", "576 is beyond 512 tokens"),
        ("clex_llama", WORDS * 40, "--test", "has no test part"),
        ("clex_llama", WORDS * 40, "--eval-lengths 200", "too few for a length of 200"),
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


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("eval_lengths: 64", "in a YAML file [4096, 8192], got 64"),
        ("eval_lengths: [64, true]", "in a YAML file [4096, 8192]"),
        ("lora_parameters: 8", "lora_parameters must be a block"),
        ("optimizer_config: 3", "optimizer_config must be a block"),
        ("report_to: 3", "--report-to must be text"),
        ("project_name: 2025-11-27", "--project-name must be text (in quotes)"),
        ('mask_prompt: "no"', "--mask-prompt must be true or false, got 'no'"),
        ("warmup: 5\nlr_schedule: {name: cosine_decay, arguments: [1e-3, 9]}", "leave them out"),
    ],
)
def test_a_yaml_value_of_another_kind_is_one_line(base, texts, tmp_path, line, match, capsys):
    """They were tracebacks, and "no" was taken for yes."""
    file = tmp_path / "c.yaml"
    file.write_text(line + "\n")
    assert call(argv_for(base, texts, tmp_path / "a", f"--iters 1 -c {file}")) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert match in error


def test_remote_code_may_be_trusted_in_yaml(tmp_path):
    """The option's own default hid the file's value."""
    file = tmp_path / "c.yaml"
    for value in (True, False):
        file.write_text(f"trust_remote_code: {str(value).lower()}\n")
        assert TrainingOptions.of(parse("-c", str(file))).trust_remote_code is value


def test_a_scaling_with_nothing_to_learn_has_no_rate(converted, texts, tmp_path, capsys):
    """It was taken, and did nothing."""
    more = "--iters 1 --scaling-learning-rate 1e-3"
    assert call(argv_for(converted("gene_llama"), texts, tmp_path / "a", more)) == 2
    assert "gene has nothing to learn" in capsys.readouterr().err


def test_a_scaling_is_tested_only_without_adapters(converted, tmp_path, capsys):
    """--scaling was left out without a word where nothing is trained."""
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


def test_nothing_given_is_one_line(capsys):
    """What to give is said."""
    for argv, match in [
        ([], "give --train, --test or both"),
        (["--train"], "No model"),
        (["--train", "--model", "m"], "No data"),
        (["--train", "--model", "m", "--data", "d", "--batch-size", "0"], "--batch-size must be"),
    ]:
        assert call(argv) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert match in error


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("samplng: skips", "'samplng', which is none of"),
        ("- a", "must be a list of"),
        ("a: [", "cannot be read"),
        ("sampling: skip", "release, skips, contiguous"),
        ("iters: many", "must be a whole number"),
        ("scaling: clx", "--scaling must be one of none, linear, "),
        ("seed: -1", "--seed must be within 0..4294967295, got -1"),
        ("lora_parameters: {rank: 8, dropout: 0.0}", "lora_parameters cannot be used"),
        ("lora_parameters: {rank: 8, scale: 1.0, dropout: 0.5}\ngrad_checkpoint: true", "twice"),
        ("lr_schedule: {name: nothing, arguments: [1]}", "lr_schedule cannot be used"),
        ("optimizer: adamw\noptimizer_config: {adamw: {decay: 1}}", "optimizer_config of adamw"),
    ],
)
def test_bad_yaml_is_one_line(base, texts, tmp_path, text, match, capsys):
    """The key is named."""
    (tmp_path / "c.yaml").write_text(text)
    argv = argv_for(base, texts, tmp_path / "a", f"-c {tmp_path / 'c.yaml'}")
    assert call(argv) == 2
    assert match in capsys.readouterr().err.strip().splitlines()[-1]


def test_options_come_before_yaml_and_yaml_before_defaults(tmp_path):
    """As in mlx_lm.lora."""
    (tmp_path / "c.yaml").write_text("iters: 7\nbatch_size: 3\nlearning_rate: 1e-4\n")
    args = TrainingOptions.of(parse("-c", str(tmp_path / "c.yaml"), "--iters", "5"))
    assert (args.iters, args.batch_size, args.learning_rate, args.seed) == (5, 3, 1e-4, 0)


def test_the_root_changes_in_one_step(base, texts, tmp_path):
    """All files at the root go through one link, so none is of another save."""
    adapters = tmp_path / "a"
    assert call(argv_for(base, texts, adapters, "--iters 2 --save-every 1")) == 0
    for name in ("adapters.safetensors", "adapter_config.json", "scaling.safetensors"):
        assert (adapters / name).readlink() == Path("current", name)
    assert (adapters / "current").readlink() == Path("checkpoints/0000002")
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["trained_scaling"] is True


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_read(file):
    """Every key is known, and the scaling can be trained at its length."""
    args = parse("-c", str(file))
    options = TrainingOptions.of(args)
    shape = {"dims": 128, "base": 1e4, "trained_length": 4096}
    scaling = build_scaling(lora.scaling_from(args), **shape)
    draws = Draws(scaling, procedure_for(scaling), np.random.default_rng(0))
    draws.check(options.max_seq_length)
    assert draws.draw(options.max_seq_length).positions.max() < 16 * 4096
    for line in file.read_text().splitlines():
        assert "#" in line, f"{line} has no comment"


@pytest.mark.parametrize(("options", "share"), [("", 0.25), ("--plain-share 0", 0)])
def test_a_plain_share_of_none_is_taken(base, options, share):
    """0 is a choice, not the lack of one."""
    model, _ = load(base)
    draws = prepare._draws(TrainingOptions.of(parse(*options.split())), model)
    assert draws.procedure.plain_share == share


def test_a_run_from_adapters_resumes(base, texts, tmp_path, capsys):
    """Its save has what it was started from; the file need not even be there any more."""
    start = str(tmp_path / "a" / "adapters.safetensors")
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2")) == 0
    whole = argv_for(base, texts, tmp_path / "b", "--iters 4", "--resume-adapter-file", start)
    assert call(whole) == 0
    half = argv_for(base, texts, tmp_path / "c", "--iters 2", "--resume-adapter-file", start)
    assert call(half) == 0
    shutil.rmtree(tmp_path / "a")
    rest = argv_for(base, texts, tmp_path / "c", "--iters 4 --grad-checkpoint", "--resume")
    assert call([*rest, "--resume-adapter-file", start]) == 0
    ours, theirs = arrays(tmp_path / "c"), arrays(tmp_path / "b")
    for name in ours:
        for key, value in ours[name].items():
            assert mx.allclose(value, theirs[name][key], atol=1e-6), key


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


def test_a_folder_that_cannot_be_made_is_one_line(base, texts, tmp_path, capsys):
    """It was an errno, and exit status 1."""
    (tmp_path / "file").write_text("")
    assert call(argv_for(base, texts, tmp_path / "file" / "a", "--iters 1")) == 2
    assert "cannot be made (Not a directory): give another" in capsys.readouterr().err


def test_adapters_of_another_rank_do_not_start_a_run(base, texts, tmp_path, capsys):
    """They trained to the end, and the result could not be loaded."""
    config = tmp_path / "c.yaml"
    config.write_text("lora_parameters: {rank: 4, scale: 20.0, dropout: 0.0}\n")
    assert call(argv_for(base, texts, tmp_path / "a", f"--iters 1 -c {config}")) == 0
    file = str(tmp_path / "a" / "adapters.safetensors")
    argv = argv_for(base, texts, tmp_path / "b", "--iters 1", "--resume-adapter-file", file)
    assert call(argv) == 2
    assert "which this run trains as" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_a_damaged_save_is_one_line(base, texts, tmp_path, name, capsys):
    """And says how to go on from the save before."""
    adapters = tmp_path / "a"
    assert call(argv_for(base, texts, adapters, "--iters 4 --save-every 2")) == 0
    file = adapters / "current" / name
    file.write_bytes(file.read_bytes()[:50])
    argv = argv_for(base, texts, adapters, "--iters 6 --save-every 2", "--resume")
    assert call(argv) == 2
    assert f"point the link {adapters / 'current'} there" in capsys.readouterr().err
    (adapters / "current").unlink()
    (adapters / "current").symlink_to("checkpoints/0000002")
    assert call(argv) == 0
    assert [line["iteration"] for line in read_log(adapters / "log.jsonl") if "loss" in line] == [
        *range(1, 7)
    ]


def test_a_log_that_a_power_cut_broke_does_not_stop_a_resume(base, texts, tmp_path):
    """Saves are on the disk for certain, the log is not."""
    adapters = tmp_path / "a"
    assert call(argv_for(base, texts, adapters, "--iters 2")) == 0
    with (adapters / "log.jsonl").open("ab") as log:
        log.write(b"\0" * 20 + b"\n")
    assert call(argv_for(base, texts, adapters, "--iters 3", "--resume")) == 0
    assert [line["iteration"] for line in read_log(adapters / "log.jsonl")][-2:] == [3, 3]


def test_a_compiled_run_resumes_bit_identically(base, texts, tmp_path):
    """`restore` puts new arrays where the compiled step looks for its state."""
    mx.enable_compile()
    assert call(argv_for(base, texts, tmp_path / "whole", "--iters 4")) == 0
    assert call(argv_for(base, texts, tmp_path / "parts", "--iters 2")) == 0
    assert call(argv_for(base, texts, tmp_path / "parts", "--iters 4", "--resume")) == 0
    assert equal(arrays(tmp_path / "whole"), arrays(tmp_path / "parts"))


def test_half_precision_weights_train(tmp_path):
    """At 1e-5 a norm's bfloat16 weight of 1 stayed 1 for ever; accumulating made it float32."""
    weight = {"norm": mx.ones((4,), mx.bfloat16), "adapter": mx.ones((4,))}
    gradient = {"norm": mx.ones((4,)), "adapter": mx.ones((4,))}
    file = str(tmp_path / "optimizer.safetensors")
    for part in range(2):
        optimizer = build_optimizer("adam", {}, 1e-5, scaling_share=1.0)
        optimizer.init(weight)
        if part == 1:  # as a resumed run does
            optimizer.state = tree_unflatten(list(mx.load(file).items()))
        for _ in range(200):
            weight = optimizer.apply_gradients(gradient, weight)
        mx.save_safetensors(file, dict(tree_flatten(optimizer.state)))
    assert (weight["norm"].dtype, weight["adapter"].dtype) == (mx.bfloat16, mx.float32)
    assert weight["adapter"][0].item() < 1 - 400e-5
    assert mx.array_equal(weight["norm"], weight["adapter"].astype(mx.bfloat16)).item()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_minds_its_learning_rate(name):
    """adafactor took one of its own, for the model and for the scaling."""

    def moved(share):
        optimizer = build_optimizer(name, {}, 1e-3, scaling_share=share)
        before = {"scaling": {"up_proj": mx.ones((4, 4))}, "rest": mx.ones((4, 4))}
        after = optimizer.apply_gradients(tree_map(mx.ones_like, before), before)
        return [mx.abs(after[k] - before[k]).max().item() for k in ("rest",)] + [
            mx.abs(after["scaling"]["up_proj"] - 1).max().item()
        ]

    (rest, whole), (same, tenth) = moved(1.0), moved(0.1)
    assert rest == pytest.approx(whole, rel=1e-3)
    assert same == rest
    assert tenth == pytest.approx(whole / 10, rel=0.01)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ("", 0.01),
        ("--release-recipe", 1.0),
        ("--fine-tune-type scaling", 1.0),
        ("--scaling-learning-rate 1e-4", 0.1),
    ],
)
def test_the_learning_rate_of_the_scaling(base, texts, tmp_path, monkeypatch, options, share):
    """Clex's is a hundredth, unless it trains alone or as published."""
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


def test_adapters_to_start_from_bring_what_lies_beside_them(base, texts, tmp_path, capsys):
    """The old adapters met a scaling and norms that had never been trained with them."""
    options = "--iters 3 --learning-rate 1e-2 --scaling-learning-rate 1e-2"
    whole = f"{options} --train-norms-and-embeddings"
    assert call(argv_for(base, texts, tmp_path / "a", whole)) == 0
    first = arrays((tmp_path / "a").resolve())
    still = "--iters 1 --learning-rate 1e-30 --scaling-learning-rate 1e-30"
    file = str(tmp_path / "a" / "adapters.safetensors")
    argv = argv_for(base, texts, tmp_path / "b", f"{still} --train-norms-and-embeddings")
    assert call([*argv, "--resume-adapter-file", file]) == 0
    assert equal(first, arrays(tmp_path / "b"))
    argv = argv_for(base, texts, tmp_path / "c", still)
    capsys.readouterr()
    assert call([*argv, "--resume-adapter-file", file]) == 2
    assert "which this run does not train" in capsys.readouterr().err


def test_a_base_of_the_same_shape_is_another_model(converted, texts, tmp_path, capsys):
    """A run went on with weights it had not begun with, since only sizes were looked at."""
    base = tmp_path / "base"
    shutil.copytree(converted("clex_llama"), base)
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 1")) == 0
    file = base / "model.safetensors"
    weights = mx.load(str(file))
    name = "model.layers.0.self_attn.q_proj.weight"
    mx.save_safetensors(str(file), weights | {name: weights[name] + 1}, {"format": "mlx"})
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2", "--resume")) == 2
    assert "the model was" in capsys.readouterr().err


def test_more_iterations_bend_a_cosine(base, texts, tmp_path, capsys):
    """The rate jumped up again at the old end."""
    argv = argv_for(base, texts, tmp_path / "a", "--iters 2 --cosine", "--resume")
    assert call(argv) == 0
    assert call([*argv, "--iters", "4"]) == 2
    assert "iters was 2 and is 4" in capsys.readouterr().err


def test_adapters_of_another_program_are_left_alone(base, texts, tmp_path, capsys):
    """A link took the place of what mlx_lm.lora had saved in the same default folder."""
    file = tmp_path / "a" / "adapters.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"theirs")
    assert call(argv_for(base, texts, file.parent, "--iters 1")) == 2
    assert "is of another program" in capsys.readouterr().err
    assert file.read_bytes() == b"theirs"
