"""Tensor names of published checkpoints, and ours.

One table for each naming. None means dropped on purpose, with the reason beside it. Names
that no table mentions are the family's own: mlx-lm's `sanitize` maps those.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InputError
from ..scaling import PREFIX

_LAYER = r"model\.layers\.(\d+)\."


@dataclass(frozen=True)
class Naming:
    """How one release names what it adds to the usual tensors of a family."""

    name: str  # for printing
    marker: str  # a tensor whose name matches tells the naming
    table: dict[str, str | None]  # pattern -> our name, None = dropped
    per_layer: bool = False  # one tensor a layer there, one stacked tensor here


# Source: DAMO-NLP-SG/CLEX at 023709d, clex_layer.py `CLEXScalingRotaryEmbedding`; its
# LLaMA, Phi and Mixtral models share these names.
CLEX = Naming(
    name="CLEX release",
    marker=r"model\.clex_layer\.",
    table={
        r"model\.clex_layer\.proj_func\.ode_up_proj": "scaling.up_proj",
        r"model\.clex_layer\.proj_func\.ode_down_proj": "scaling.down_proj",
        # Follows from rope_theta, and is rounded to bfloat16 in some folders.
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

# Tables of rotary frequencies, in files of every naming: computed, never read.
_COMPUTED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True)
class Renaming:
    """What becomes of the tensors of a checkpoint."""

    naming: Naming
    kept: list[str]  # as they are
    scaling: dict[str, list[str]]  # our name -> theirs, in the order of layers
    dropped: list[str]


def rename(names: Iterable[str]) -> Renaming:
    """Sort the names of a checkpoint into kept, renamed and dropped.

    Raises:
        InputError: a layer lacks a tensor that the others have.
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
                f"in layer {max(layers)}: is a shard missing?"
            )
    scaling = {target: [layers[i] for i in sorted(layers)] for target, layers in found.items()}
    return Renaming(naming, kept, scaling, dropped)


def _look_up(naming: Naming, name: str) -> tuple[str | None, int] | None:
    for pattern, target in naming.table.items():
        match = re.fullmatch(pattern, name)
        if match:
            return target, int(match[1]) if match.groups() else 0
    return None
