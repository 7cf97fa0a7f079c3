"""The config that a conversion decides on."""

import json

import mlx.core as mx
import pytest
from mlx_clex.convert import convert
from mlx_clex.convert.decide import _config
from mlx_clex.convert.options import Options
from mlx_lm.utils import save_model

import mlx_clex
from mlx_clex.checkpoint.config import BASE_ROPE
from mlx_clex.checkpoint.sizes import Held

from ..conftest import GOLDEN, stock_folder, tiny_llama
from ..tiny_families import config

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("own_rope", [None, "keep"])
def test_the_length_of_a_rope_that_mlx_lm_ignores(own_rope):
    """--own-rope keep took 128 tokens for mlx-lm's plain Mixtral rope, which is made for 32."""
    source = config("mixtral", rope_scaling=YARN, max_position_embeddings=128)
    held = Held(1 << 40, 1 << 20)  # enough for any model
    notes: list[str] = []

    options = Options(scaling={"type": "ntk"}, own_rope=own_rope)
    decided = _config(source, held, options, notes)

    assert decided["max_position_embeddings"] == 32
    assert "mlx-lm ignores the source's own rope (yarn)" in notes[0]
    assert BASE_ROPE not in decided


@pytest.mark.parametrize("alike", [0, 1, 511])
def test_a_head_that_differs_somewhere_is_kept(alike, tmp_path):
    """Only row 0 was compared with the embedding. It is often <unk>, which is never trained."""
    settings = {"vocab_size": 512, "max_position_embeddings": 64, "tie_word_embeddings": True}
    source = stock_folder(tmp_path, GOLDEN / "clex_llama", **settings)
    model = tiny_llama(vocabulary=512)
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight = mx.concatenate([embedding[:alike], model.lm_head.weight[alike:]])
    save_model(source, model)
    (source / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | settings)
    )

    convert(source, tmp_path / "out")

    tokens = mx.array([[1, 5, 9, 40]])
    assert mx.array_equal(mlx_clex.load(tmp_path / "out")[0](tokens), model(tokens))


def test_plain_weights_may_name_the_quantisation_that_they_had(tmp_path):
    """mlx_lm.convert keeps the entry of an fp8 checkpoint; the advice was to convert with it."""
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    source = stock_folder(
        tmp_path, GOLDEN / "clex_llama", vocab_size=512, max_position_embeddings=64,
        quantization_config=entry,
    )  # fmt: skip

    convert(source, tmp_path / "out")

    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
