"""All scalings, by their names in a config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..errors import InputError
from .base import PREFIX, RotaryShape, Scaling
from .clex import Clex
from .dynamic import Dynamic
from .gene import Gene, GeneParam
from .linear import Linear
from .none import NoScaling
from .ntk import Ntk
from .yarn import Yarn
from .yarn_t import YarnT

__all__ = ["PREFIX", "SCALINGS", "RotaryShape", "Scaling", "build_scaling"]

SCALINGS: dict[str, type[Scaling]] = {
    method.name: method
    for method in (
        NoScaling,
        Linear,
        Ntk,
        Dynamic,
        Yarn,
        YarnT,
        Clex,
        Gene,
        GeneParam,
    )
}


def build_scaling(
    rope_scaling: Mapping[str, Any],
    *,
    dims: int,
    base: float,
    trained_length: int,
    inv_freq: Sequence[float] | None = None,
    gain: float = 1.0,
    weights: Mapping[str, mx.array] | None = None,
    heads: int | None = None,
    key_heads: int | None = None,
    layers: int | None = None,
) -> Scaling:
    """Return the scaling that a `rope_scaling` entry asks for.

    Args:
        rope_scaling: `{"type": name, ...}`, as in a config.json.
        dims: D, rotated dimensions of a head.
        base: rope_theta.
        trained_length: L0, in tokens.
        inv_freq: the base model's frequencies, radians per token, (D/2,); None: the
            frequencies of a plain rope with this base.
        gain: the gain of the base model's rope, on rotated dimensions.
        weights: the learned tensors, such as `scaling.up_proj`; None: untrained.
        heads: number of query heads; None: read from the weights if they have it.
        key_heads: number of key heads; None: the same as `heads`.
        layers: number of layers; None: read from the weights if they have it.

    Raises:
        InputError: unknown type or key, a value out of range, or weights of another
            shape.
    """
    if not isinstance(rope_scaling, Mapping):
        raise InputError(
            f'rope_scaling must be an entry such as {{"type": "clex"}}, got {rope_scaling!r}.'
        )
    name = rope_scaling.get("type", rope_scaling.get("rope_type", "none"))
    if not isinstance(name, str) or name not in SCALINGS:
        raise InputError(
            f"mlx_clex has no rope_scaling type {name!r}. It has: {', '.join(SCALINGS)}."
        )
    per_head = (weights or {}).get(PREFIX + "base_coef")
    if per_head is not None and heads is None and per_head.ndim == 3:
        layers, heads = per_head.shape[:2]
    scaling = SCALINGS[name].from_config(
        rope_scaling,
        dims=dims,
        base=base,
        trained_length=trained_length,
        inv_freq=None if inv_freq is None else tuple(inv_freq),
        gain=gain,
        heads=heads,
        key_heads=key_heads,
        layers=layers,
    )
    if weights is not None:
        scaling.take_weights(weights)
    return scaling
