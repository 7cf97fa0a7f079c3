"""Map tensor names of published checkpoints to ours, with one table for each naming.

None in a table means that the tensor is dropped on purpose. Names that match no table belong
to the family; mlx-lm's `sanitize` maps them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InputError
from ..scaling import PREFIX

_LAYER = r"model\.layers\.(\d+)\."


@dataclass(frozen=True)
class Naming:
    """How a release names the tensors that it adds to a family."""

    name: str  # for messages
    marker: str  # pattern of a tensor name that only this naming has
    table: dict[str, str | None]  # pattern -> our name; None: dropped
    per_layer: bool = False  # the release has one tensor for each layer; ours are stacked


# Source: DAMO-NLP-SG/CLEX at 023709d, clex_layer.py `CLEXScalingRotaryEmbedding`; its
# LLaMA, Phi and Mixtral models share these names.
CLEX = Naming(
    name="CLEX release",
    marker=r"model\.clex_layer\.",
    table={
        r"model\.clex_layer\.proj_func\.ode_up_proj": "scaling.up_proj",
        r"model\.clex_layer\.proj_func\.ode_down_proj": "scaling.down_proj",
        # Computed from rope_theta; some checkpoints store it rounded to bfloat16.
        r"model\.clex_layer\.inv_freq": None,
    },
)

# Source: LhLi-QED/GeNE at cd27b18, gene/gene_rope.py `InverseAngularVelocity`.
GENE_PARAM = Naming(
    name="GeNE release",
    marker=_LAYER + r"self_attn\.rotary_emb\.inv_angular_velocity\.",
    table={
        _LAYER + r"self_attn\.rotary_emb\.inv_angular_velocity\.base_coef": ("scaling.base_coef"),
        _LAYER + r"self_attn\.rotary_emb\.inv_angular_velocity\.specific_coef": (
            "scaling.specific_coef"
        ),
    },
    per_layer=True,
)

CONVERTED = Naming(name="mlx_clex", marker=re.escape(PREFIX), table={})
PLAIN = Naming(name="plain", marker="", table={})

NAMINGS = (CLEX, GENE_PARAM, CONVERTED, PLAIN)

# Rotary tables, which any checkpoint may have; mlx_clex computes them.
_COMPUTED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True)
class Renaming:
    """The tensor names of a checkpoint, sorted by what conversion does with them."""

    naming: Naming
    kept: list[str]  # unchanged
    scaling: dict[str, list[str]]  # our name -> published names, in the order of layers
    dropped: list[str]


def rename(names: Iterable[str]) -> Renaming:
    """Sort the tensor names of a checkpoint into kept, renamed and dropped.

    Raises:
        InputError: a layer lacks a tensor that later layers have.
    """
    names = list(names)
    naming = next(
        n for n in NAMINGS if any(re.match(n.marker, name) for name in names) or n is PLAIN
    )
    kept: list[str] = []
    dropped: list[str] = []
    found: dict[str, dict[int, str]] = {}
    for name in names:
        hit = _look_up(naming, name)
        if hit is not None:
            target, layer = hit
            if target is None:
                dropped.append(name)
            else:
                found.setdefault(target, {})[layer] = name
        elif _COMPUTED.fullmatch(name):
            dropped.append(name)
        else:
            kept.append(name)
    for target, layers in found.items():
        absent = set(range(max(layers) + 1)) - set(layers)
        if absent:
            raise InputError(
                f"The checkpoint has no tensor for {target} in layer {min(absent)}, but one "
                f"in layer {max(layers)}. Download the missing shard."
            )
    scaling = {target: [layers[i] for i in sorted(layers)] for target, layers in found.items()}
    return Renaming(naming, kept, scaling, dropped)


def _look_up(naming: Naming, name: str) -> tuple[str | None, int] | None:
    for pattern, target in naming.table.items():
        match = re.fullmatch(pattern, name)
        if match:
            return target, int(match[1]) if match.groups() else 0
    return None
