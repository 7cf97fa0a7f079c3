"""Checks of tensors: a model's and its first logits, those of a save, and those written.

MLX does not stop at NaN or infinity, so damaged weights would only show as nonsense text.
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from .scaled_model import make_prompt_cache

_ADVICE = "The file is damaged or its training diverged: use another copy or an earlier save."


def check_finite(model: nn.Module) -> None:
    """Refuse a model with tensors or logits that are not finite, or logits that are all equal.

    It reads every weight once and runs a pass of two tokens.

    Args:
        model: with its weights in memory.

    Raises:
        InputError: the message names the first such tensor, or, if only the logits are wrong,
            the tensor with the largest values.
    """
    flat: Any = tree_flatten(model.parameters())
    for name, tensor in flat:
        if mx.issubdtype(tensor.dtype, mx.signedinteger) or tensor.dtype == mx.bool_:
            raise InputError(
                f"The tensor {name} has the type {str(tensor.dtype).removeprefix('mlx.core.')}. "
                "Weights are floats, or unsigned integers where they are quantised. The file is "
                "damaged: use another copy."
            )
    tensors = {name: a for name, a in flat if mx.issubdtype(a.dtype, mx.floating) and a.size}
    # NaN or infinity makes the sum not finite. So may large numbers, so the tensor is checked too.
    sums = [tensor.sum().astype(mx.float32) for tensor in tensors.values()]
    logits = model(mx.array([[0, 1]]), cache=make_prompt_cache(model))[0, -1].astype(mx.float32)
    # Both ends are NaN if any logit is NaN. Computed together with the sums, which costs less.
    found: Any = mx.stack([*sums, logits.min(), logits.max()]).tolist()
    *found, low, high = found
    for (name, tensor), total in zip(tensors.items(), found, strict=True):
        check_sum(name, tensor, total)
    # Activations that overflow in a norm become zeros, and all logits are then equal. A single
    # logit of -inf is legal: it rules a token out.
    if not (low < high < math.inf):
        name, value = _largest(tensors)
        what = "all equal" if low == high else "not finite"
        raise InputError(
            f"The model's logits are {what}. Its largest weight is {value:.3g}, in {name}. "
            f"{_ADVICE}"
        )


def check_like(given: Mapping[str, mx.array], like: Mapping[str, mx.array]) -> None:
    """Refuse tensors of a file that cannot replace others.

    Args:
        given: the file's, by name.
        like: those to be replaced.

    Raises:
        InputError: a name is missing or unknown, a shape or a kind of number differs, or values
            are not finite; the message names the first such tensor.
    """
    for name in sorted(given.keys() | like.keys()):
        there, here = given.get(name), like.get(name)
        if there is None or here is None:
            raise InputError(f"The tensor {name} is {'missing' if there is None else 'unknown'}.")
        if there.shape != here.shape or there.dtype != here.dtype:
            raise InputError(
                f"The tensor {name} is {there.dtype} {there.shape}; it must be {here.dtype} "
                f"{here.shape}."
            )
        if mx.issubdtype(there.dtype, mx.floating) and not mx.isfinite(there).all().item():
            raise InputError(f"The tensor {name} has values that are not finite.")


def check_sum(name: str, tensor: mx.array, total: float) -> None:
    """Check a tensor whose sum is known, which is not finite if a value is not.

    Raises:
        InputError: the tensor has values that are NaN or infinite; the message names it.
    """
    if math.isfinite(total) or mx.isfinite(tensor).all().item():
        return
    narrow = " as float16; bfloat16 may hold them" if tensor.dtype == mx.float16 else ""
    raise InputError(f"The tensor {name} has values that are not finite{narrow}. {_ADVICE}")


def _largest(tensors: dict[str, mx.array]) -> tuple[str, float]:
    sizes = {name: float(mx.abs(tensor).max()) for name, tensor in tensors.items()}
    name = max(sizes, key=lambda name: sizes[name])
    return name, sizes[name]
