"""A loaded model over several processes, as mlx-lm's own programs share one.

Tensor parallel: every process has a part of each layer, and its heads. Pipeline: every process
has some of the layers. Which of the two a family can do is mlx-lm's; what is of ours follows: a
scaling keeps the frequencies of its process's heads, and caches those of its layers.

Not covered: adapters, which mlx-lm cannot share out either: fuse them first.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, RunError
from .scaled_model import ScaledModel
from .stock import config_value, model_name


def share_out(model: nn.Module, group: mx.distributed.Group, *, pipeline: bool = False) -> None:
    """Keep of a lazily loaded model what this process computes, and read that.

    Args:
        model: from `load`, weights not read yet.
        group: the processes.
        pipeline: share out layers instead of heads.

    Raises:
        InputError: the family cannot be shared so, or does not divide evenly.
    """
    size = group.size()
    stages = getattr(getattr(model, "model", None), "pipeline", None)
    tensors = getattr(model, "shard", None)
    if (stages if pipeline else tensors) is None:
        other = tensors if pipeline else stages
        advice = f"; {'leave out' if pipeline else 'give'} --pipeline" if other else ""
        what = "pipeline" if pipeline else "tensor"
        raise InputError(f"mlx-lm has no {what} parallel form of {model_name(model)}{advice}.")
    if stages is not None and pipeline:
        if len(model.layers) < size:
            raise InputError(f"{len(model.layers)} layers do not give {size} processes one each.")
        stages(group)
        if isinstance(model, ScaledModel):
            model.check_stage()
    else:
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = config_value(model, name)
            if heads is not None and heads % size:
                raise InputError(
                    f"{heads} {name} of {model_name(model)} do not divide among {size} processes: "
                    "start another number of them."
                )
        model.shard(group)
    mx.eval(model.parameters())
    wait_for_all(group)


def wait_for_all(group: mx.distributed.Group) -> None:
    """Return once every process is here.

    Raises:
        RunError: one of them has ended.
    """
    try:
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group, stream=mx.cpu))
    except RuntimeError as error:
        raise RunError(f"Another process ended; its own message says why ({error}).") from error


def shared_seed(group: mx.distributed.Group) -> int:
    """A random seed, the same in every process, since they sample the same tokens."""
    drawn = mx.random.randint(0, 1 << 30) if group.rank() == 0 else mx.array(0)
    seed: Any = mx.distributed.all_sum(drawn, group=group, stream=mx.cpu).item()
    return seed


@contextmanager
def one_voice(group: mx.distributed.Group) -> Iterator[None]:
    """Let the first process alone print; what the others raise still comes out."""
    if group.rank() == 0:
        yield
        return
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
