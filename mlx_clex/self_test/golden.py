"""Compare a tiny CLEX checkpoint with the answers of the published code.

`python -m mlx_clex.self_test.golden` prints the error of one pass, for a process in which TF32 has
another setting: MLX reads MLX_ENABLE_TF32 once.
"""

import importlib.resources
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from ..errors import RunError
from ..model.rotary import rotate, rotate_at
from ..model.scaled_model import attach, make_prompt_cache
from ..scaling import PREFIX
from .measurement import Measurement, largest

_START = 60  # tokens of the golden text that are read in one pass; the rest is decoded
_LOGITS = 5e-4


def golden_model(scaling: dict[str, Any] | None = None) -> tuple[nn.Module, dict[str, mx.array]]:
    """Return the packaged two-layer model (trained length 32) and its expected outputs.

    Args:
        scaling: another rope_scaling entry, untrained; None: the checkpoint's CLEX.
    """
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
    if scaling is not None:
        return attach(model, scaling), golden
    return attach(model, rope_scaling, weights=learned), golden


def frequencies() -> Iterator[Measurement]:
    """Compare the frequencies at each scale; relative error."""
    model, golden = golden_model()
    expected = golden["frequencies"]
    ours = mx.stack([model.scaling.inv_freq(t + 1.0) for t in range(len(expected))])
    yield Measurement("golden frequencies", largest(ours / expected - 1), 3e-5)


def _prefill_error() -> float:
    model, golden = golden_model()
    logits = model(golden["tokens"][None])[:, -8:]
    return largest(logits - golden["prefill_logits"])


def prefill() -> Iterator[Measurement]:
    """Compare the logits of one pass over 100 tokens, at scale 4."""
    yield Measurement("golden prefill", _prefill_error(), _LOGITS)


def prefill_with_tf32() -> Iterator[Measurement]:
    """Measure the same with TF32, MLX's default on M5 and CUDA, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        env=os.environ | {"MLX_ENABLE_TF32": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RunError(f"The process ended with status {done.returncode}: {done.stderr[-300:]}")
    yield Measurement("golden prefill, TF32", float(done.stdout))


def decode() -> Iterator[Measurement]:
    """Compare the logits of token-by-token decoding while the scale grows and keys move."""
    model, golden = golden_model()
    tokens = golden["tokens"][None]
    cache = make_prompt_cache(model)
    logits = [model(tokens[:, :_START], cache=cache)[:, -1]]
    for position in range(_START, tokens.shape[1]):
        logits.append(model(tokens[:, position : position + 1], cache=cache)[:, -1])
    error = largest(mx.stack(logits, axis=1) - golden["decode_logits"])
    yield Measurement("golden decode", error, _LOGITS)


def moved_keys() -> Iterator[Measurement]:
    """Compare keys moved through seven steps of the scale with fresh keys; RMS error."""
    model, golden = golden_model()
    steps = [model.scaling.inv_freq(t + 1.0) for t in range(len(golden["frequencies"]))]
    keys = mx.random.normal((1, 2, 300, 16), key=mx.random.key(0))
    # In bfloat16 each move rounds once.
    for name, dtype, bound in (("", mx.float32, 1e-4), (", bfloat16", mx.bfloat16, 2e-2)):
        moved = rotate(keys.astype(dtype), steps[0])
        for old, new in itertools.pairwise(steps):
            moved = rotate(moved, new - old)
        fresh = rotate(keys.astype(dtype).astype(mx.float32), steps[-1])
        error = float(mx.sqrt(mx.mean(mx.square(moved - fresh))))
        yield Measurement(f"moved keys{name}", error, bound)


def network_gradients() -> Iterator[Measurement]:
    """Compare the gradients of CLEX's network; relative to the largest."""
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
    yield Measurement("network gradients", max(errors), 1e-3)


if __name__ == "__main__":
    print(_prefill_error())
