"""Command: print versions and device, describe a model, and run a self-test.

The self-test needs no network and no model. It uses a tiny checkpoint in `golden/` with the
outputs of the published code (made by tests/make_self_test_data.py). The output is one block
that can be pasted into an issue.

Not covered: quantised models, and speed at the size of a real model.
"""

import argparse
import importlib.metadata
import importlib.resources
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from ._blas import use_openblas
from .commands.run_command import run_command
from .diagnosis.model_report import PROBLEM, report
from .errors import RunError
from .model.rotary import rotate, rotate_at
from .model.scaled_model import attach, make_prompt_cache
from .scaling import PREFIX

PACKAGES = ("mlx-clex", "mlx", "mlx-lm", "transformers", "numpy")
START = 60  # tokens of the golden text that are read in one pass; the rest is decoded


@dataclass(frozen=True)
class Outcome:
    """The measurement of a check and its bound."""

    measured: float
    bound: float
    at_least: bool = False  # the bound is a lower bound

    @property
    def passed(self) -> bool:
        """Return whether the measurement is within the bound; False for NaN."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        if self.at_least:
            return f"{self.measured:.2f}, at least {self.bound:g}"
        return f"{self.measured:.1e}, at most {self.bound:g}"


def golden_model() -> tuple[nn.Module, dict[str, mx.array]]:
    """Return the packaged two-layer CLEX model (trained length 32) and its expected outputs."""
    file = importlib.resources.files("mlx_clex") / "golden" / "clex_llama.safetensors"
    with importlib.resources.as_file(file) as path:
        loaded: Any = mx.load(str(path), return_metadata=True)
        tensors, metadata = loaded
        mx.eval(tensors)
    config = json.loads(metadata["config"])
    golden = {name.removeprefix("golden."): t for name, t in tensors.items() if "golden." in name}
    learned = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    plain = {
        name: tensor.astype(mx.float32)
        for name, tensor in tensors.items()
        if name not in learned and "golden." not in name
    }
    rope_scaling = config.pop("rope_scaling")
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights(list(plain.items()))
    model.eval()
    return attach(model, rope_scaling, weights=learned), golden


def largest(difference: mx.array) -> float:
    """Return the largest absolute entry."""
    return float(mx.abs(difference).max())


def golden_frequencies() -> Outcome:
    """Compare the frequencies at each scale with the published code's; relative error."""
    model, golden = golden_model()
    expected = golden["frequencies"]
    ours = mx.stack([model.scaling.inv_freq(t + 1.0) for t in range(len(expected))])
    return Outcome(largest(ours / expected - 1), 3e-5)


def golden_prefill() -> Outcome:
    """Compare the logits of one pass over 100 tokens, at scale 4, with the published code's."""
    model, golden = golden_model()
    logits = model(golden["tokens"][None])[:, -8:]
    return Outcome(largest(logits - golden["prefill_logits"]), 5e-4)


def golden_decode() -> Outcome:
    """Compare the logits of token-by-token decoding while the scale grows and keys move."""
    model, golden = golden_model()
    tokens = golden["tokens"][None]
    cache = make_prompt_cache(model)
    logits = [model(tokens[:, :START], cache=cache)[:, -1]]
    for position in range(START, tokens.shape[1]):
        logits.append(model(tokens[:, position : position + 1], cache=cache)[:, -1])
    return Outcome(largest(mx.stack(logits, axis=1) - golden["decode_logits"]), 5e-4)


def _keys(length: int) -> mx.array:
    """Return random keys, (B, H, L, head_dim), variance 1."""
    return mx.random.normal((1, 2, length, 16), key=mx.random.key(0))


def moved_keys(dtype: mx.Dtype = mx.float32, bound: float = 1e-4) -> Outcome:
    """Compare keys moved through seven steps of the scale with fresh keys; RMS error."""
    model, golden = golden_model()
    steps = [model.scaling.inv_freq(t + 1.0) for t in range(len(golden["frequencies"]))]
    keys = _keys(300).astype(dtype)
    moved = rotate(keys, steps[0])
    for old, new in itertools.pairwise(steps):
        moved = rotate(moved, new - old)
    fresh = rotate(keys.astype(mx.float32), steps[-1])
    return Outcome(float(mx.sqrt(mx.mean(mx.square(moved - fresh)))), bound)


def moved_keys_bfloat16() -> Outcome:
    """Run `moved_keys` in bfloat16, where each move rounds once."""
    return moved_keys(mx.bfloat16, 2e-2)


def fused_rotation() -> Outcome:
    """Compare `mx.fast.rope` with plain cosines and sines, up to position 8,191."""
    model, _ = golden_model()
    inv_freq = model.scaling.inv_freq(4.0)
    errors = []
    for offset in (0, 7_936):
        both = [rotate(_keys(256), inv_freq, offset, fused=fused) for fused in (True, False)]
        errors.append(largest(both[0] - both[1]))
    # Rounding an angle of 8,191 radians to float32 alone turns a key by 5e-4.
    return Outcome(max(errors), 5e-3)


def plain_gradients() -> Outcome:
    """Compare the gradients of CLEX's network with the published code's; plain rotation."""
    model, golden = golden_model()
    length, scale = 32, 5
    sampled = golden["train_t5_sampled_positions"] + 1
    ends = mx.array([0]), mx.array([length * scale - 1])
    positions = mx.concatenate([ends[0], sampled, ends[1]])
    cos_weight, sin_weight = golden["train_t5_cotangent"]
    half = cos_weight.shape[-1] // 2
    # A pair (1, 0) turned by an angle is (its cosine, its sine).
    unit = mx.concatenate([mx.ones((1, 1, length, half)), mx.zeros((1, 1, length, half))], -1)

    def loss(scaling: Any) -> mx.array:
        inv_freq = scaling.differentiable_inv_freq(float(scale))
        turned = rotate_at(unit, inv_freq, positions)[0, 0]
        cos, sin = mx.split(turned, 2, axis=-1)
        total = cos * (cos_weight[:, :half] + cos_weight[:, half:])
        return (total + sin * (sin_weight[:, :half] + sin_weight[:, half:])).sum()

    _, gradients = nn.value_and_grad(model.scaling, loss)(model.scaling)
    errors = []
    for name in ("up_proj", "down_proj"):
        expected = golden[f"train_t5_grad_ode_{name}"]
        errors.append(largest(gradients[name] - expected) / largest(expected))
    return Outcome(max(errors), 1e-3)


def decode_ratio() -> Outcome:
    """Measure decoding speed with CLEX / without it, on a small random model."""
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=512,
        num_hidden_layers=6,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=2048,
        max_position_embeddings=256,
    )
    stock, scaled = llama.Model(args), llama.Model(args)
    scaled.update(stock.parameters())
    attach(scaled, {"type": "clex"})
    stock.eval()
    scaled.eval()
    prompt = mx.random.randint(0, 2048, (1, 300), key=mx.random.key(0))
    caches = {id(model): make_prompt_cache(model) for model in (stock, scaled)}
    for model in (stock, scaled):
        mx.eval(model(prompt, cache=caches[id(model)]))

    def seconds(model: nn.Module) -> float:
        start = time.perf_counter()
        for _ in range(12):
            mx.eval(model(prompt[:, :1], cache=caches[id(model)]))
        return time.perf_counter() - start

    ratios = [seconds(stock) / seconds(scaled) for _ in range(15)]
    return Outcome(statistics.median(ratios), 0.8, at_least=True)


CHECKS: tuple[Callable[[], Outcome], ...] = (
    golden_frequencies,
    golden_prefill,
    golden_decode,
    moved_keys,
    moved_keys_bfloat16,
    fused_rotation,
    plain_gradients,
    decode_ratio,
)


def versions() -> dict[str, str]:
    """Return the versions of the packages, the device and the platform, as texts by name."""
    lines = {}
    for package in PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
    lines["python"] = f"{platform.python_version()} on {platform.platform()}"
    lines["back end"] = _back_end()
    lines["device"] = ", ".join(f"{key} {value}" for key, value in mx.device_info().items())
    if sys.platform == "linux":
        lines["OpenBLAS"] = use_openblas() or (
            "not in use (not found, or mlx was imported before mlx_clex)"
        )
    return lines


def _back_end() -> str:
    if mx.default_device().type == mx.DeviceType.cpu:
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def self_test(checks: Iterable[Callable[[], Outcome]]) -> int:
    """Run checks, print a line for each, and return how many failed."""
    failed = 0
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            outcome = check()
            verdict, detail = ("PASS" if outcome.passed else "FAIL"), str(outcome)
        # A check that raises has failed; the other checks still run.
        except Exception as error:
            verdict, detail = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}"
        failed += verdict == "FAIL"
        print(f"{verdict}  {name:<20} {detail}", flush=True)
    return failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "model",
        nargs="?",
        default=None,
        help="Also describe this model: a folder, a .gguf file or a Hugging Face id. Its weights "
        "are not read.",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="Also check golden logits, moved keys, rotations, gradients and decoding speed. Takes "
        "a minute.",
    )


def run(args: argparse.Namespace) -> None:
    """Print the block.

    Raises:
        InputError: the model is not found.
        RunError: a check of the self-test failed, or the model has a problem.
    """
    rows = report(args.model) if args.model is not None else []
    print("```")
    for name, value in versions().items():
        print(f"{name:<14} {value}")
    for name, value in rows:
        print(f"{name:<14} {value}")
    if args.self_test:
        # On M5 and CUDA, MLX multiplies float32 in TF32, of three digits; it reads the variable at
        # its first product, which is in the self-test. A value that is set stays.
        tf32 = os.environ.setdefault("MLX_ENABLE_TF32", "0")
        print(f"{'TF32':<14} MLX_ENABLE_TF32={tf32}")
        start = time.perf_counter()
        failed = self_test(CHECKS)
        print(f"{len(CHECKS)} checks in {time.perf_counter() - start:.0f} s, {failed} failed")
    print("```")
    if args.self_test and failed:
        raise RunError(f"{failed} of {len(CHECKS)} checks failed. Please report the block above.")
    problems = sum(name == PROBLEM for name, _ in rows)
    if problems:
        raise RunError(f"{args.model} has {problems} problem(s), named above.")


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(
        run_command(
            add_arguments,
            run,
            prog="mlx_clex.doctor",
            description="Print versions and device, describe a model, run a self-test.",
            example="mlx_clex doctor my-model",
        )
    )


if __name__ == "__main__":
    main()
