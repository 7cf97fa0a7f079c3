"""Compare a compiled, checkpointed training step with stored gradients.

The stored ones are of the plain objective on a CPU, neither compiled nor checkpointed
(tests/make_self_test_data.py).
"""

import importlib.resources
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ..data.batch import Batch
from ..training.draws import Draw
from ..training.step import TrainingStep
from .golden import golden_model
from .measurement import Measurement, largest

METHODS = ("clex", "gene", "gene-param")
# The rope_scaling of each; None keeps the golden model's own.
_ENTRIES = (None, {"type": "gene", "factor": 4}, {"type": "gene-param", "factor": 4})
FILE = "training_gradients.safetensors"
_SCALE = 3.0


def step_of(method: str) -> tuple[TrainingStep, Batch, Draw]:
    """Return a training step of the golden model, and what it takes.

    The optimizer keeps the gradient, and the model's weights stay as they are.
    """
    model, golden = golden_model(_ENTRIES[METHODS.index(method)])
    rng = np.random.default_rng(0)
    for name in model.scaling.learned:  # at its start, much of the gradient is zero
        model.scaling[name] = mx.array(rng.uniform(-0.1, 0.1, model.scaling[name].shape))
    model.train()
    names = ("layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj", "scaling")
    model.freeze()
    for name, module in model.named_modules():
        if name.endswith(names):
            module.unfreeze()
    tokens = np.array(golden["tokens"])[:65]
    batch = Batch(tokens[None, :-1], tokens[None, 1:], np.ones((1, 64), np.float32))
    positions = np.sort(rng.choice(int(64 * _SCALE), 64, replace=False)).astype(np.float32)
    # With momentum, the optimizer's state after one step is the gradient.
    optimizer = optim.SGD(learning_rate=0.0, momentum=0.5)
    return TrainingStep(model, optimizer, grad_checkpoint=True), batch, Draw(_SCALE, positions)


def training_step() -> Iterator[Measurement]:
    """Compare the gradients of each method; relative to the largest of a tensor."""
    file = importlib.resources.files("mlx_clex") / "golden" / FILE
    with importlib.resources.as_file(file) as path:
        stored: Any = mx.load(str(path))
        mx.eval(stored)
    for method in METHODS:
        step, batch, draw = step_of(method)
        step(batch, draw)
        ours = {name.removesuffix(".v"): v for name, v in step.optimizer_arrays().items()}
        errors = [
            largest(ours[name.removeprefix(f"{method}.")] - expected) / largest(expected)
            for name, expected in stored.items()
            if name.startswith(f"{method}.")
        ]
        yield Measurement(f"training step, {method}", max(errors), 1e-3)
