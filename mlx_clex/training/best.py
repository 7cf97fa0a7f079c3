"""Keep the weights with the best validation of a run.

Not covered: when a run validates (`loop.py`).
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError, shown
from ..model.finite import check_like

BEST = "best.safetensors"  # the kept weights, in a save


class Best:
    """The trained weights of the smallest loss so far, those of the start included."""

    def __init__(self) -> None:
        self.loss = math.inf  # nats
        self.weights: dict[str, mx.array] = {}

    def consider(self, model: nn.Module, loss: float) -> bool:
        """Keep a copy of the trained weights if `loss` is the smallest; return whether it is."""
        if not loss < self.loss:
            return False
        self.loss = loss
        trained: Any = tree_flatten(model.trainable_parameters())
        self.weights = {name: mx.array(value) for name, value in trained}
        mx.eval(self.weights)
        return True

    def restore(self, model: nn.Module) -> None:
        """Put the kept weights into the model."""
        model.load_weights(list(self.weights.items()), strict=False)

    def resume(self, loss: float, weights: Mapping[str, mx.array], model: nn.Module) -> None:
        """Go on from a save.

        Raises:
            InputError: the loss is not one, or the weights are not those that the model trains.
        """
        if type(loss) not in (int, float) or not 0 <= loss <= math.inf:
            raise InputError(f"The best loss is {shown(loss)}; it must be at least 0 nats.")
        if loss < math.inf:
            check_like(weights, dict(tree_flatten(model.trainable_parameters())))
        self.loss, self.weights = loss, dict(weights)
