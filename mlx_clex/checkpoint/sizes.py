"""Hold the model that a config asks for against what its weight files can hold.

Building a model makes an object for every layer, and finding its ropes computes with tensors of
the sizes in config.json. So a wrong number there could take all memory before loading compares
the first shape.

Not covered: names and single shapes, which loading compares.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from .safetensors_file import TensorInfo

# Modules of a model for each of its tensors: at most 2 in the families of mlx-lm. Some families
# stack the tensors of their experts, so they have fewer modules.
_MODULES_EACH, _MODULES_BESIDE = 8, 1000
# Numbers of a model for each in its files: 2 where the files leave out a head that is the
# embedding.
_NUMBERS_EACH, _NUMBERS_BESIDE = 2, 1 << 16
_MOST_TENSORS = 100_000


@dataclass(frozen=True)
class Held:
    """What weight files hold at most."""

    numbers: int
    tensors: int

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo]) -> "Held":
        """Count tensors; whole numbers may hold packed weights of 2 bits."""
        counts = [
            8 * tensor.nbytes // 2 if tensor.dtype[0] in "UI" else math.prod(tensor.shape)
            for tensor in tensors
        ]
        return cls(sum(counts), len(counts))

    @classmethod
    def in_bytes(cls, nbytes: int) -> "Held":
        """Return the bounds that follow from the size of the files alone."""
        return cls(8 * nbytes // 2, min(nbytes // 256, _MOST_TENSORS))


def build_within(held: Held, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the model that `build` makes.

    Args:
        held: what the files of the model hold.
        build: makes a model with lazy arrays.

    Raises:
        InputError: it has more modules or numbers than the files can hold. Building ends at the
            first module too many.
    """
    most = _MODULES_EACH * held.tensors + _MODULES_BESIDE
    made = 0
    stock: Any = nn.Module.__init__

    def counted(module: nn.Module) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise _too_large(f"more than {most:,} modules", f"{held.tensors:,} tensors")
        stock(module)

    changed: Any = nn.Module
    changed.__init__ = counted
    try:
        model = build()
    finally:
        changed.__init__ = stock
    flat: Any = tree_flatten(model.parameters())
    numbers = sum(array.size for _, array in flat)
    if numbers > _NUMBERS_EACH * held.numbers + _NUMBERS_BESIDE:
        raise _too_large(f"{numbers:,} numbers", f"{held.numbers:,} at most")
    return model


def _too_large(asked: str, held: str) -> InputError:
    return InputError(
        f"config.json describes a model of {asked}, but its weight files hold {held}. Is it "
        "another model's config.json?"
    )
