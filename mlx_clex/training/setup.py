"""Choose the trained parameters and build the optimizer.

Adapters, schedules and optimizers are those of mlx-lm and mlx. Added are the tensors of the
scaling, with a learning rate of their own, and norms and embeddings (after LongLoRA,
arXiv 2309.12307, which found adapters alone too weak for longer contexts).

Not covered: the steps of training (`step.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers

from ..checkpoint.adapters import check_lora
from ..errors import InputError, reading, shown
from ..scaling import PREFIX

FINE_TUNE_TYPES = ("lora", "dora", "full", "scaling")
OPTIMIZERS: dict[str, Any] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
# Numbers that each keeps for a weight that it trains.
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 1, "adafactor": 0}
_LORA_KEYS = {"rank", "scale", "dropout", "keys"}
# Settings of ours, which `optimizer_config` may replace.
_OPTIONS: dict[str, dict[str, Any]] = {
    "adafactor": {"relative_step": False},  # True would ignore the learning rate
}


def check_family(model: nn.Module) -> None:
    """Refuse a family that computes something else in training, without a cache, than in use.

    Raises:
        InputError: layers of the model share the cached keys of earlier ones.
    """
    if any(getattr(module, "is_kv_shared_layer", False) for module in model.modules()):
        raise InputError(
            "mlx-lm computes gemma3n without a cache, as in training, with keys of their own in "
            "layers that share those of earlier layers in use. Adapters trained so would not fit: "
            "it cannot be trained here."
        )


def choose_trained(
    model: Any,
    *,
    fine_tune_type: str,
    num_layers: int,
    lora_parameters: Mapping[str, Any],
    scaling: bool,
    norms_and_embeddings: bool,
) -> frozenset[str]:
    """Freeze all parameters of the model except those that are trained.

    Args:
        model: from `load` or `attach`.
        fine_tune_type: one of `FINE_TUNE_TYPES`.
        num_layers: how many of the last layers; -1 for all.
        lora_parameters: rank, scale, dropout and optionally keys, as in mlx-lm.
        scaling: train the tensors of the scaling, if it has any.
        norms_and_embeddings: train the norms and embeddings of all layers as well.

    Returns:
        Names of the parameters that are trained because of `norms_and_embeddings` alone.

    Raises:
        InputError: nothing would be trained, or a quantised weight would be.
    """
    model.freeze()
    count = len(model.layers)
    last = model.layers[-num_layers:] if 0 < num_layers < count else model.layers
    if fine_tune_type == "full":
        if any(isinstance(m, nn.QuantizedLinear) for layer in last for m in layer.modules()):
            raise InputError(
                "--fine-tune-type full cannot train quantised weights: use lora or dora, or an "
                "unquantised model."
            )
        for layer in last:
            layer.unfreeze()
    elif fine_tune_type != "scaling":
        flat: Any = tree_flatten(model.parameters())
        widest = max((max(a.shape) for _, a in flat if a.ndim == 2), default=1)
        check_lora(lora_parameters, widest, "lora_parameters")
        if unknown := sorted(map(shown, lora_parameters.keys() - _LORA_KEYS)):
            raise InputError(
                f"lora_parameters has {', '.join(unknown)}, which is none of: "
                f"{', '.join(sorted(_LORA_KEYS))}."
            )
        with reading("lora_parameters cannot be used"):
            _check_keys(model, last, lora_parameters.get("keys"))
            linear_to_lora_layers(
                model, len(last), dict(lora_parameters), use_dora=fine_tune_type == "dora"
            )
    if scaling and model.scaling.learned:
        model.scaling.unfreeze()
    before = set(dict(tree_flatten(model.trainable_parameters())))
    if norms_and_embeddings:
        _unfreeze_norms_and_embeddings(model)
    after = set(dict(tree_flatten(model.trainable_parameters())))
    if not after:
        raise InputError(
            f"--fine-tune-type {fine_tune_type} trains nothing: {model.scaling.name} has "
            "no tensors of its own, or --scaling-learning-rate is 0. Use lora, dora or full."
        )
    return frozenset(after - before)


def _check_keys(model: nn.Module, layers: Sequence[nn.Module], keys: Any) -> None:
    """Refuse names of adapted modules that mlx-lm would not find, in a layer or in the model."""
    inside = {name for layer in layers for name, module in layer.named_modules() if _linear(module)}
    known = inside | {name for name, _ in model.named_modules()}
    if unknown := sorted(set(keys or ()) - known):
        raise InputError(
            f"lora_parameters.keys has {', '.join(unknown)}, which no layer has. Names here: "
            f"{', '.join(sorted(inside))}."
        )


def _linear(module: nn.Module) -> bool:
    return "weight" in module and module["weight"].ndim >= 2


def _unfreeze_norms_and_embeddings(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedEmbedding):
            raise InputError(
                f"--train-norms-and-embeddings cannot train {name}, which is quantised: use an "
                "unquantised model, or leave the option out."
            )
        if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
            module.unfreeze()


def build_optimizer(
    name: str,
    options: Mapping[str, Any],
    learning_rate: Any,
    *,
    scaling_share: float,
) -> optim.Optimizer:
    """Build an optimizer with one part for the model and one for the scaling.

    Args:
        name: one of `OPTIMIZERS`.
        options: settings of this optimizer, as in mlx-lm's `optimizer_config`.
        learning_rate: a number, or a schedule from `learning_rate_schedule`.
        scaling_share: the scaling's learning rate / the model's.

    Raises:
        InputError: a setting that the optimizer does not have.
    """
    kind = _with_masters(OPTIMIZERS[name])
    with reading(f"optimizer_config of {name} cannot be used"):
        options = _OPTIONS.get(name, {}) | dict(options)
        # Most settings are read only at an update.
        tried = {"weight": mx.ones((2, 2))}
        mx.eval(kind(learning_rate=1e-3, **options).apply_gradients(tried, tried))
        return optim.MultiOptimizer(
            [
                kind(learning_rate=_times(learning_rate, scaling_share), **options),
                kind(learning_rate=learning_rate, **options),
            ],
            [lambda path, _: path.startswith(PREFIX)],
        )


def _with_masters(kind: type[optim.Optimizer]) -> Any:
    """Return an optimizer that keeps a float32 copy of each half-precision weight in its state.

    bfloat16 cannot represent 1 + 1e-5, so small updates added to a norm's weight of 1 would
    never change it.
    """

    class WithMasters(kind):  # type: ignore[misc, valid-type]
        def init_single(self, parameter: mx.array, state: dict) -> None:
            master = parameter.astype(mx.float32)
            super().init_single(master, state)
            if parameter.dtype != mx.float32:
                state["master"] = master

        def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
            master = state.get("master", parameter)
            updated = super().apply_single(gradient.astype(mx.float32), master, state)
            if "master" in state:
                state["master"] = updated
            return updated.astype(parameter.dtype)

    return WithMasters


def learning_rate_schedule(
    learning_rate: float, *, updates: int, warmup: int, cosine: bool, config: Any = None
) -> Any:
    """Return a number, or a function from the update to the learning rate.

    Args:
        learning_rate: the highest one.
        updates: how many the whole run has.
        warmup: how many updates the linear growth from 0 takes.
        cosine: fall to 0 along a half cosine after the warm-up.
        config: mlx-lm's `lr_schedule`, used instead of the other arguments.

    Raises:
        InputError: a schedule that mlx-lm does not know.
    """
    if config is None:
        if not (warmup or cosine):
            return learning_rate
        # Without a cosine: a constant, as a straight line from the rate to itself.
        config = {"name": "linear_schedule", "arguments": [learning_rate, learning_rate, 1]}
        if cosine:
            arguments = [learning_rate, max(1, updates - warmup)]
            config = {"name": "cosine_decay", "arguments": arguments}
        config["warmup"] = warmup
    try:
        return build_schedule(config)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"lr_schedule cannot be used: {error!r}.") from error


def highest(schedule: Any, updates: int) -> float:
    """Return the highest learning rate of a run.

    Args:
        schedule: from `learning_rate_schedule`.
        updates: how many the whole run has.

    Raises:
        InputError: the schedule does not give numbers.
    """
    with reading("lr_schedule cannot be used"):
        rate: Any = mx.max(mx.array(schedule(mx.arange(updates)))).item()
        return rate


def _times(learning_rate: Any, share: float) -> Any:
    if not callable(learning_rate):
        return learning_rate * share
    return lambda step: mx.array(learning_rate(step)) * share
