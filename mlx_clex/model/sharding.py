"""Split a loaded model among several processes, as mlx-lm's programs do.

Tensor parallel: every process has some heads of each layer. Pipeline: every process has some of
the layers. mlx-lm defines which of the two a family supports. The scaling keeps the frequencies
of the process's heads; the planner keeps the caches of its layers.

Not covered: adapters, which mlx-lm cannot split either. Fuse them first.
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
    """Keep the part of a lazily loaded model that this process computes, and read it.

    Args:
        model: a model from `load`, weights not read yet.
        group: the processes.
        pipeline: split the layers instead of the heads.

    Raises:
        InputError: the family cannot be split this way, or does not divide evenly.
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
                    f"The {heads} {name} of {model_name(model)} do not divide among {size} "
                    "processes. Start another number of processes."
                )
        model.shard(group)
    mx.eval(model.parameters())
    wait_for_all(group)


def wait_for_all(group: mx.distributed.Group) -> None:
    """Wait until every process has called this.

    Raises:
        RunError: a process has ended.
    """
    try:
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group, stream=mx.cpu))
    except RuntimeError as error:
        raise RunError(
            f"Another process ended; see its message for the reason ({error})."
        ) from error


def shared_seed(group: mx.distributed.Group) -> int:
    """Return a random seed that is the same in every process, so all sample the same tokens."""
    drawn = mx.random.randint(0, 1 << 30) if group.rank() == 0 else mx.array(0)
    mx.eval(drawn)
    seed: Any = mx.distributed.all_sum(drawn, group=group, stream=mx.cpu).item()
    return seed


@contextmanager
def one_voice(group: mx.distributed.Group) -> Iterator[None]:
    """Let only the first process print; exceptions of the others still show."""
    if group.rank() == 0:
        yield
        return
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
