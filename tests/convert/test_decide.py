"""The config that a conversion decides on."""

import pytest
from mlx_clex.convert.decide import _config
from mlx_clex.convert.options import Options

from mlx_clex.checkpoint.config import BASE_ROPE
from mlx_clex.checkpoint.sizes import Held

from ..tiny_families import config

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("own_rope", [None, "keep"])
def test_the_length_of_a_rope_that_mlx_lm_ignores(own_rope):
    """--own-rope keep took 128 tokens for mlx-lm's plain Mixtral rope, which is made for 32."""
    source = config("mixtral", rope_scaling=YARN, max_position_embeddings=128)
    held = Held(1 << 40, 1 << 20)  # enough for any model
    notes: list[str] = []

    decided = _config(source, held, Options(scaling={"type": "ntk"}, own_rope=own_rope), notes)

    assert decided["max_position_embeddings"] == 32
    assert "mlx-lm ignores the source's own rope (yarn)" in notes[0]
    assert BASE_ROPE not in decided
