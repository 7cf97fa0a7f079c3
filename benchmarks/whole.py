"""Cases of the suite that load, train, convert or serve: whole programs against stock mlx-lm."""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx_clex  # isort: skip  (before mlx.core: on Linux it looks for OpenBLAS)

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_clex.convert import convert as convert_checkpoint
from mlx_lm.generate import generate_step

from mlx_clex.commands.memory_check import MemoryCheck
from mlx_clex.diagnosis.machine import size_text, this_machine
from mlx_clex.diagnosis.memory import Training, peak, training
from mlx_clex.diagnosis.sizes import sizes_of_model

from . import convert as conversion
from .blocks import AGAIN, KINDS, OURS, STOCK, Comparison, NotRun
from .parallel_clients import LENGTHS, first_tokens, served, text
from .speed import Setup

_EXTRA = 0.015  # seconds that loading may take longer


def load(setup: Setup) -> Iterator[Comparison]:
    """Load a folder and decode the first token, with the check of the memory that commands make."""
    ids = mx.array([1, 2, 3])

    def block(kind: str) -> None:
        if kind == OURS:
            check = MemoryCheck(force=False)
            then = check.at_load(partial(check.reading, 512, step=512))
            model, _ = mlx_clex.load(setup.folders[kind], before_reading=then)
            cache = mlx_clex.make_prompt_cache(model, 64)
        else:
            model = mlx_lm.load(str(setup.folders[kind]))[0]
            cache = mlx_clex.make_prompt_cache(model)
        next(generate_step(ids, model, max_tokens=1, prompt_cache=cache))

    yield Comparison("load, first token", 3, setup.interleave(block), most_extra=_EXTRA)


def train(setup: Setup) -> Iterator[Comparison | NotRun]:
    """Take a training step of each length, in processes that all stay, as far as memory allows."""
    machine = this_machine()
    sizes = sizes_of_model(setup.stock)
    for length in setup.trained:
        # The stock step keeps all logits.
        run = Training(length=length, grad_checkpoint=True, learns=True)
        needed = len(KINDS) * peak(training(sizes, run, machine.back_end))
        if needed > machine.usable:
            reason = f"needs {size_text(needed)} of {size_text(machine.usable)}"
            yield NotRun("training step", length, reason)
            continue
        with ExitStack() as stack:
            steps = {
                kind: stack.enter_context(_trainer(setup.folders[STOCK], kind, length))
                for kind in KINDS
            }
            peaks: dict[str, float] = {}

            def block(kind: str) -> float:
                found = _answer(steps[kind])  # noqa: B023
                peaks[kind] = found["peak"]  # noqa: B023
                return found["cpu" if setup.cpu_time else "seconds"]

            seconds = setup.interleave(block)
        goal = 0.55 if length >= 4096 else 0.9
        yield Comparison("training step", length, seconds, goal=1.0, memory=peaks, memory_goal=goal)


@contextmanager
def _trainer(folder: Path, kind: str, length: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process that takes a step for each line that it reads."""
    case = "ours" if kind == OURS else "stock"
    command = [sys.executable, "-m", "benchmarks.train_memory", "--case", case, "--on-request"]
    command += ["--model", str(folder), "--length", str(length)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write("step\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a training process ended")
    return json.loads(line)


def convert(setup: Setup) -> Iterator[Comparison]:
    """Convert a checkpoint of six shards, and (as stock) copy its files."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        size, _ = conversion.write_checkpoint(source, 0.6 if setup.quick else 3.0)

        def block(kind: str) -> None:
            if kind == OURS:
                convert_checkpoint(source, target, scaling={"type": "clex"})
            else:
                shutil.copytree(source, target)

        def clear(kind: str) -> None:
            shutil.rmtree(target, ignore_errors=True)

        seconds = setup.interleave(block, clear)
        clear(OURS)
        memory, _ = conversion.convert(source, target, [])
    found = {OURS: memory, STOCK: float(size)}  # of stock: the file itself
    yield Comparison("convert", round(size / 1e6), seconds, unit="MB", memory=found)


def server(setup: Setup) -> Iterator[Comparison]:
    """Answer eight clients at once: the median and 95th percentile of times to first token."""
    lengths = [length // 4 if setup.quick else length for length in LENGTHS]
    programs = {STOCK: "mlx_lm.server", OURS: "mlx_clex.server"}
    late: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        clients = {
            kind: stack.enter_context(
                served(setup.folders[kind], "--prompt-cache-size", 0, module=module)
            )
            for kind, module in programs.items()
        }

        def block(kind: str) -> float:
            client = clients[STOCK if kind == AGAIN else kind]
            found = first_tokens(client, [text(n, tokens) for n, tokens in enumerate(lengths)])
            late[kind].append(float(np.percentile(found, 95)))
            return statistics.median(found)

        seconds = setup.interleave(block)
    longest = max(lengths)
    yield Comparison("8 clients, first token, p50", longest, seconds, goal=0.99)
    later = {kind: its[1:] for kind, its in late.items()}  # the first warmed up
    yield Comparison("8 clients, first token, p95", longest, later, goal=0.99)


CASES: dict[str, Callable[[Setup], Iterator[Comparison | NotRun]]] = {
    "load": load,
    "train": train,
    "convert": convert,
    "server": server,
}
