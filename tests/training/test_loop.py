"""The training loop: resumed runs, kills, failures, and saves that follow a finite loss."""

import json
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
import yaml

from mlx_clex import load
from mlx_clex.training.log import read_log
from mlx_clex.training.saves import Checkpoints
from mlx_clex.training.step import TrainingStep

from .commands import argv_for, arrays, call, equal

pytestmark = pytest.mark.usefixtures("eager")


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


def test_a_compiled_run_resumes_bit_identically(base, texts, tmp_path):
    """`restore` puts new arrays where the compiled step looks for its state."""
    mx.enable_compile()
    assert call(argv_for(base, texts, tmp_path / "whole", "--iters 4")) == 0
    assert call(argv_for(base, texts, tmp_path / "parts", "--iters 2")) == 0
    assert call(argv_for(base, texts, tmp_path / "parts", "--iters 4", "--resume")) == 0
    assert equal(arrays(tmp_path / "whole"), arrays(tmp_path / "parts"))


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
        ("learning_rate: 1.0e39", None),
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


@pytest.mark.parametrize(
    ("where", "more", "told"),
    [
        ("job", "--iters 1 --test", "The test loss is nan."),
        ("loop", "--iters 1", "Iteration 0: the validation loss is nan; nothing was saved yet."),
    ],
)
def test_a_reported_loss_that_is_no_number_is_no_result(
    base, texts, tmp_path, monkeypatch, capsys, where, more, told
):
    """It printed "Test loss nan" or "Val loss nan", with exit status 0."""
    (tmp_path / "data").mkdir()
    for name in ("train", "valid", "test"):
        row = json.dumps({"text": "the quick brown fox runs away . " * 30}) + "\n"
        (tmp_path / "data" / f"{name}.jsonl").write_text(row * 4)
    monkeypatch.setattr(f"mlx_clex.training.{where}.mean_loss", lambda *_: float("nan"))
    assert call(argv_for(base, tmp_path / "data", tmp_path / "a", more)) == 1
    assert told in capsys.readouterr().err.strip().splitlines()[-1]


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


def test_a_folder_that_cannot_be_made_is_one_line(base, texts, tmp_path, capsys):
    """It was an errno, and exit status 1."""
    (tmp_path / "file").write_text("")
    assert call(argv_for(base, texts, tmp_path / "file" / "a", "--iters 1")) == 2
    assert "cannot be written (Not a directory). Give another" in capsys.readouterr().err
