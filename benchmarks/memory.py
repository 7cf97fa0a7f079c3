"""Compare the peak memory that `mlx_clex plan` predicts with `mx.get_peak_memory()`.

    python -m benchmarks.memory [--model build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf] [--quick]

Without --model, a random LLaMA of 6 layers is measured, with --quick at short lengths. Each
setting is read or trained once to warm up and once to measure. Memory does not depend on the load
of the machine.
"""

import argparse
import gc
from dataclasses import replace
from typing import Any

from mlx_clex import attach, load, make_prompt_cache  # before mlx.core: it looks for OpenBLAS

import mlx.core as mx  # isort: skip
import mlx.optimizers as optim
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_clex.diagnosis.machine import this_back_end
from mlx_clex.diagnosis.memory import Reading, Training, peak, reading, training
from mlx_clex.diagnosis.sizes import Sizes, sizes_of_model
from mlx_clex.self_test.measurement import random_llama
from mlx_clex.training.draws import Draws
from mlx_clex.training.step import Batch, TrainingStep, compute_in_depth

# Lengths are multiplied by --times.
SETTINGS: tuple[Reading | Training, ...] = (
    Reading(length=256, step=256),
    Reading(length=512, step=256),
    Reading(length=512, step=512),
    Reading(length=1024, step=128),
    Reading(length=512, step=256, kv_bits=8, kv_start=0),
    Training(length=128, learns=True),
    Training(length=256, learns=True),
    Training(length=128, batch=2, rank=32, learns=True),
    Training(length=256, grad_checkpoint=True, learns=True),
    Training(length=512, grad_checkpoint=True, learns=True),
    Training(length=128, batch=2, grad_checkpoint=True, learns=True),
    Training(length=256, num_layers=2),
)


def tiny_model() -> Any:
    """Return a random LLaMA of 6 layers with CLEX, in float32."""
    changes = {"hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 352}
    changes |= {"num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 256}
    model = attach(random_llama(**changes), {"type": "clex", "max_factor": 64})
    mx.eval(model.parameters())
    return model


def predicted(sizes: Sizes, run: Reading | Training) -> float:
    """Return the peak that the plan says, in bytes."""
    terms: Any = training if isinstance(run, Training) else reading
    return peak(terms(sizes, run, this_back_end()))


def measured(model: Any, run: Reading | Training) -> int:
    """Return the peak of a run on a loaded model, in bytes; training leaves adapters in it."""
    gc.collect()
    return _train(model, run) if isinstance(run, Training) else _read(model, run)


def _read(model: Any, run: Reading) -> int:
    # The last token of a prompt is read with the first that is generated.
    prompt = mx.zeros((run.length + 1,), mx.int32)
    cache = make_prompt_cache(model, run.length + 1)
    mx.clear_cache()
    mx.reset_peak_memory()
    options: dict[str, Any] = {"prefill_step_size": run.step, "kv_bits": run.kv_bits}
    for _ in generate_step(
        prompt, model, max_tokens=1, prompt_cache=cache, quantized_kv_start=run.kv_start, **options
    ):
        pass
    return mx.get_peak_memory()


def _train(model: Any, run: Training) -> int:
    model.freeze()
    settings = {"rank": run.rank, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, run.num_layers, settings)
    if run.learns:
        model.scaling.unfreeze()
    model.train()
    mx.eval(model.parameters())
    step = TrainingStep(model, optim.Adam(learning_rate=1e-5), grad_checkpoint=run.grad_checkpoint)
    # Plain steps cut the rows, and need less.
    procedure = replace(model.scaling.procedure, plain_share=0.0)
    draws = Draws(model.scaling, procedure, np.random.default_rng(0))
    shape = (run.batch, run.length + 1)
    tokens = np.random.default_rng(0).integers(0, 500, shape).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones_like(tokens[:, 1:], np.float32))
    step(batch, draws.draw(run.length))
    mx.clear_cache()
    mx.reset_peak_memory()
    step(batch, draws.draw(run.length))
    return mx.get_peak_memory()


def described(run: Reading | Training) -> str:
    """Return a setting as text."""
    if isinstance(run, Reading):
        bits = f", {run.kv_bits}-bit KV" if run.kv_bits else ""
        return f"read {run.length}, step {run.step}{bits}"
    ways = ", checkpointing" if run.grad_checkpoint else ""
    ways += "" if run.learns else f", {run.num_layers} layers, network still"
    return f"train {run.batch} x {run.length}, rank {run.rank}{ways}"


def main() -> None:
    """Measure all settings and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder, a .gguf file or a Hugging Face id")
    parser.add_argument("--times", type=int, default=2, help="multiplies the lengths (default: 2)")
    parser.add_argument("--quick", action="store_true", help="the same as --times 1")
    args = parser.parse_args()
    compute_in_depth()  # as `lora` does
    times = 1 if args.quick else args.times
    print("| setting | predicted, MB | measured, MB | predicted / measured |\n|---|---|---|---|")
    for setting in SETTINGS:
        changes: dict[str, Any] = {"length": setting.length * times}
        if isinstance(setting, Reading):
            changes["step"] = setting.step * times
        run = replace(setting, **changes)
        model = tiny_model() if args.model is None else _loaded(args.model)
        expected = predicted(sizes_of_model(model), run)
        found = measured(model, run)
        del model
        print(
            f"| {described(run)} | {expected / 1e6:.1f} | {found / 1e6:.1f} "
            f"| {expected / found:.2f} |",
            flush=True,
        )


def _loaded(path: str) -> Any:
    model: Any = load(path)[0]
    model.set_dtype(mx.float32)
    attach(model, {"type": "clex"}, trained_length=1024)
    mx.eval(model.parameters())
    return model


if __name__ == "__main__":
    main()
