"""Compare peak memory and time of a training step with mlx_lm.lora on the same model.

Each case runs `--rounds` times, each time in a new process. `peak` is MLX's peak memory after
one warm-up step; seconds are the median over rounds of the fastest step. `head` is the memory
of the loss head: the peak minus the peak of the same step with the mean of the hidden states
as its loss. `cpu` is the sum of seconds over all cores, which depends less on other load.
`--first-step` takes one step without warming up, and leaves `head` out: for models whose steps
take minutes.

    python -m benchmarks.train_memory [--length 4096] [--model FOLDER] [--rounds 3] [--json]

Without --model: hidden 256, 2 layers, 4 heads, vocabulary 32000, gradient checkpointing.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mlx_clex import attach, load  # before mlx.core: on Linux it looks for OpenBLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_clex.model.chunked_loss import hidden_states
from mlx_clex.scaling import build_scaling
from mlx_clex.self_test.measurement import random_llama
from mlx_clex.training import step as step_module
from mlx_clex.training.draws import Draws
from mlx_clex.training.step import Batch, TrainingStep

CASES = ("stock", "ours", "stock body", "ours body")
STEPS = 3


def build(path: str | None, ours: bool, length: int) -> Any:
    """Return the model with LoRA layers, with CLEX for a trained length of `length` if `ours`."""
    mx.random.seed(0)
    if path:
        model: Any = load(path)[0]
    else:
        model = random_llama(
            intermediate_size=688,
            vocab_size=32_000,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
    if ours:
        attach(model, {"type": "clex"}, trained_length=length)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    if ours:
        model.scaling.unfreeze()
    model.train()
    mx.eval(model.parameters())
    return model


def stock_step(model: Any, tokens: np.ndarray, *, body: bool) -> Callable[[], object]:
    """Return the training step of mlx_lm.lora, copied because its loop has no function for it."""
    trainer.grad_checkpoint(model.layers[0])
    optimizer = optim.Adam(learning_rate=1e-5)
    batch = mx.array(tokens)
    lengths = mx.array([[0, tokens.shape[1]]] * len(tokens))

    def mean_hidden(model: Any, batch: mx.array, lengths: mx.array) -> Any:
        return model.model(batch[:, :-1]).mean().astype(mx.float32), lengths.sum()

    loss = nn.value_and_grad(model, mean_hidden if body else trainer.default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    def step() -> mx.array:
        (value, _), gradient = loss(model, batch, lengths)
        optimizer.update(model, gradient)
        return value

    compiled: Any = mx.compile(step, inputs=state, outputs=state)
    return lambda: mx.eval(compiled(), state)


def our_step(model: Any, tokens: np.ndarray, *, body: bool) -> Callable[[], object]:
    """Return the training step of mlx_clex.lora with CLEX and its default procedure."""
    step = TrainingStep(model, optim.Adam(learning_rate=1e-5), grad_checkpoint=True)
    if body:

        def mean_hidden(model: Any, tokens: mx.array, *_: Any) -> Any:
            value = hidden_states(model, tokens).mean().astype(mx.float32)
            return value, mx.stop_gradient(value)

        # Replaces the loss that the step module imported.
        vars(step_module)["loss_for_gradient"] = mean_hidden
    draws = Draws(model.scaling, model.scaling.procedure, np.random.default_rng(0))
    ones = np.ones((len(tokens), tokens.shape[1] - 1), np.float32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones)
    return lambda: step(batch, draws.draw(batch.tokens.shape[1]))


def prepared(
    case: str, path: str | None, length: int, *, warm: bool = True
) -> Callable[[], object]:
    """Return the training step of a case, after one to warm up if `warm`."""
    ours, body = case.startswith("ours"), case.endswith("body")
    if ours:
        step_module.compute_in_depth()
    model = build(path, ours, length)
    tokens = np.random.default_rng(0).integers(0, model.args.vocab_size, (1, length + 1))
    step = (our_step if ours else stock_step)(model, tokens.astype(np.int32), body=body)
    if warm:
        step()
    mx.clear_cache()
    mx.reset_peak_memory()
    return step


def measure(case: str, path: str | None, length: int, *, first: bool) -> dict[str, float]:
    """Return the peak in bytes and the seconds of the fastest step, or of the first step."""
    step = prepared(case, path, length, warm=not first)
    times = [timed(step) for _ in range(1 if first else STEPS)]
    seconds, cpu = (min(column) for column in zip(*times, strict=True))
    return {"peak": mx.get_peak_memory(), "seconds": seconds, "cpu": cpu}


def serve(case: str, path: str | None, length: int) -> None:
    """Take a step for each line of the input, and print its figures."""
    step = prepared(case, path, length)
    for _ in sys.stdin:
        seconds, cpu = timed(step)
        found = {"peak": mx.get_peak_memory(), "seconds": seconds, "cpu": cpu}
        print(json.dumps(found), flush=True)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return (wall-clock seconds, CPU seconds of all cores) of a call."""
    started, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - cpu


def scaling_time() -> dict[str, float]:
    """Return seconds per step of CLEX's frequencies, forward and backward.

    D is 128, param_factor 1, and the scale t runs from 2 to 16.
    """
    scaling = build_scaling(
        {"type": "clex", "max_factor": 16}, dims=128, base=1e4, trained_length=4096
    )

    def loss(scale: mx.array) -> mx.array:
        return scaling.differentiable_inv_freq(scale).sum()

    both: Any = mx.compile(nn.value_and_grad(scaling, loss))

    def evaluated(scale: mx.array) -> None:
        mx.eval(both(scale))

    evaluated(mx.array(1.0))
    times = [timed(partial(evaluated, mx.array(float(t)))) for t in range(2, 17)]
    seconds, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return {"seconds": seconds, "cpu": cpu}


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--on-request", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_request:
        serve(args.case, args.model, args.length)
        return
    if args.case:
        print(json.dumps(measure(args.case, args.model, args.length, first=args.first_step)))
        return
    found: dict[str, Any] = {}
    for _ in range(args.rounds):
        for case in CASES[:2] if args.first_step else CASES:
            command = [sys.executable, __file__, "--case", case, "--length", str(args.length)]
            command += ["--model", args.model] if args.model else []
            command += ["--first-step"] if args.first_step else []
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.setdefault(case, []).append(json.loads(out.splitlines()[-1]))
    found = {
        case: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for case, runs in found.items()
    }
    for who in ("stock", "ours"):
        body = found.get(f"{who} body", {"peak": math.nan})
        found[who]["head"] = found[who]["peak"] - body["peak"]
    found["ratios"] = {key: found["ours"][key] / found["stock"][key] for key in found["stock"]}
    found["scaling"] = scaling_time()
    if args.json:
        print(json.dumps(found))
        return
    print(f"{'':8} {'peak MiB':>9} {'head MiB':>9} {'s a step':>9} {'cpu s':>9}")
    for who in ("stock", "ours"):
        row = found[who]
        print(
            f"{who:8} {row['peak'] / 2**20:9.0f} {row['head'] / 2**20:9.0f} "
            f"{row['seconds']:9.3f} {row['cpu']:9.3f}"
        )
    row = found["ratios"]
    print(
        f"{'ratio':8} {row['peak']:9.2f} {row['head']:9.2f} {row['seconds']:9.2f} {row['cpu']:9.2f}"
    )
    seconds, cpu = found["scaling"]["seconds"], found["scaling"]["cpu"]
    share = seconds / found["ours"]["seconds"]
    print(
        f"CLEX's frequencies, forward and backward: {1e3 * seconds:.1f} ms, {1e3 * cpu:.1f} ms of "
        f"one core, {share:.2%} of a step"
    )


if __name__ == "__main__":
    main()
