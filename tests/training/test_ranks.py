"""Fine-tuning by two processes of mlx.launch is that of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_clex.convert import convert

from mlx_clex.errors import RunError
from mlx_clex.training.log import read_log
from mlx_clex.training.ranks import Ranks
from mlx_clex.training.saves import Checkpoints

from ..conftest import GOLDEN
from ..model.test_sharding import LAUNCH
from ..model.test_sharding import pytestmark as needs_launch

pytestmark = needs_launch
OPTIONS = (
    "--train --batch-size 4 --max-seq-length 32 --num-layers 2 --learning-rate 0.02 "
    "--packing plain --grad-accumulation-steps 2 --max-grad-norm 1 --optimizer sgd "
    "--scaling-learning-rate 1e-5 --iters 24 --save-every 4 --steps-per-eval 24 --eval-lengths 32"
)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """A folder with a model, and texts of many lengths."""
    top = tmp_path_factory.mktemp("parallel")
    convert(GOLDEN / "clex_llama", top / "base", dtype="float32")
    rng = np.random.default_rng(0)
    (top / "texts").mkdir()
    for split in ("train", "valid"):
        texts = (" ".join(["word"] * rng.integers(2, 20)) for _ in range(40))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (top / "texts" / f"{split}.jsonl").write_text(lines)
    return top


def lora(top, adapters, more):
    paths = ["--model", top / "base", "--data", top / "texts", "--adapter-path", adapters]
    argv = [*paths, *OPTIONS.split(), *more.split()]
    return [sys.executable, "-m", "mlx_clex.lora", *map(str, argv)]


def start(command, top, **env):
    """In a group of its own, as a terminal starts it."""
    return subprocess.Popen(
        command,
        # Without compiling, which takes a C++ compiler seconds a kernel on the CPU.
        env=os.environ | {"HOME": str(top), "MLX_DISABLE_COMPILE": "1"} | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def free_ports():
    """The first of two in a row, below those the system hands out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return 10_000 + free.getsockname()[1] % 20_000


def launch(top, adapters, more=""):
    command = [str(LAUNCH), "-n", "2", "-p", str(free_ports()), "--", *lora(top, adapters, more)]
    return start(command, top)


def ring(top, adapters, *more):
    """Two processes without mlx.launch, which kills the other when one has ended."""
    port = free_ports()
    hosts = top / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    return [
        start(lora(top, adapters, options), top, MLX_HOSTFILE=str(hosts), MLX_RANK=str(rank))
        for rank, options in enumerate(more)
    ]


def end(process):
    """What it printed, and our own lines of what it said went wrong."""
    out, err = process.communicate(timeout=300)
    return out, [line for line in err.splitlines() if line.startswith("mlx_clex lora:")]


def wait_for(adapters, iteration):
    deadline = time.monotonic() + 300
    while not any(line["iteration"] >= iteration for line in read_log(adapters / "log.jsonl")):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


def weights(adapters):
    names = ("adapters.safetensors", "scaling.safetensors")
    return {k: np.array(v) for name in names for k, v in mx.load(str(adapters / name)).items()}


@pytest.fixture(scope="module")
def two(top):
    """A run of two processes that nothing disturbed."""
    out, errors = end(launch(top, top / "two"))
    assert errors == []
    assert out.count("Iter 24: Train loss") == 1, "one process prints"
    return top / "two"


def test_losses_are_those_of_one_process(top, two):
    """Rows with unequal numbers of tokens, accumulated and clipped."""
    assert end(start(lora(top, top / "one", ""), top))[1] == []
    ours, theirs = (read_log(folder / "log.jsonl") for folder in (two, top / "one"))
    assert len(ours) == len(theirs) == 26
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() & {"loss", "scale", "tokens", "learning_rate", "valid_loss"}:
            assert line[key] == pytest.approx(other[key], rel=1e-5), (line, other)


def test_a_killed_and_a_stopped_run_go_on(top, two):
    """One process killed; then Ctrl-C, which a terminal sends to all: as if nothing had been."""
    parts = top / "parts"
    first, second = ring(top, parts, "", "")
    wait_for(parts, 6)
    second.kill()
    (_, (error,)), (_, quiet) = end(first), end(second)
    assert first.returncode == 1
    assert "Another process ended" in error
    assert quiet == []

    stopped = launch(top, parts, "--resume")
    wait_for(parts, 10)
    os.killpg(stopped.pid, signal.SIGINT)
    end(stopped)
    newest = Checkpoints(parts, keep=2).newest
    assert newest is not None
    assert int(newest.name) == read_log(parts / "log.jsonl")[-1]["iteration"] < 24

    assert end(launch(top, parts, "--resume"))[1] == []
    assert read_log(two / "log.jsonl") == read_log(parts / "log.jsonl")
    one, other = weights(two), weights(parts)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_cannot_be_is_told_once(top):
    """A batch that does not divide, and processes that would do different things."""
    assert end(launch(top, top / "x", "--batch-size 3"))[1] == [
        "mlx_clex lora: error: --batch-size 3 does not divide among 2 processes: give a multiple "
        "of 2, or start another number of them."
    ]
    first, second = ring(top, top / "x", "", "--seed 5")
    (_, (error,)), (_, quiet) = end(first), end(second)
    assert "do not have the same options" in error
    assert quiet == []
    assert (first.returncode, second.returncode) == (2, 2)
    assert not (top / "x").exists()


def test_nan_stops_both_with_one_line(top):
    """Neither waits for the other for ever, and the last good save still loads."""
    adapters = top / "nan"
    options = "--learning-rate 1e30 --warmup 1 --max-grad-norm 0 --save-every 2"
    first, second = ring(top, adapters, options, options)
    (_, (error,)), (_, quiet) = end(first), end(second)
    assert quiet == []
    assert (first.returncode, second.returncode) == (1, 1)
    assert "Iteration 4: after its update " in error
    assert f"the last good save is {adapters / 'checkpoints' / '0000002'}" in error
    assert all(np.isfinite(value).all() for value in weights(adapters).values())


def test_a_failure_of_mlx_names_the_process():
    """It ended in silence in all but the first."""
    second = Ranks(SimpleNamespace(size=lambda: 2, rank=lambda: 1))
    with pytest.raises(RunError, match="MLX failed in process 2 of 2: no memory"), second.running():
        raise RuntimeError("no memory")
