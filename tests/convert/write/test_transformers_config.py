"""transformers reads every config.json that convert writes, as it does for the tokenizer."""

import json

import pytest
from mlx.utils import tree_flatten
from mlx_clex.convert.decide import decide_outcome
from mlx_clex.convert.options import Options
from transformers import CONFIG_MAPPING, AutoConfig

from ...configuration_table import EXCEPTIONS, RUNS
from ...published_configs import build, scaled, text_config

NAMES = {scaled(name)["model_type"]: name for name in RUNS if name not in EXCEPTIONS}
KNOWN = [name for family, name in NAMES.items() if family in CONFIG_MAPPING]


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", KNOWN)
def test_transformers_reads_the_config_of_a_scaling(name, tmp_path):
    """phi3 with any scaling, and yarn in sixteen more families, were written and never loaded."""
    config = scaled(name)
    weights = dict(tree_flatten(build(config).parameters()))
    # One type that transformers has, with keys it wants, and one that it does not have.
    for method in ("yarn", "clex"):
        outcome = decide_outcome(config, dict(weights), Options(scaling={"type": method}))
        (tmp_path / "config.json").write_text(json.dumps(outcome.config))
        read = AutoConfig.from_pretrained(tmp_path)
        length = text_config(outcome.config).get("max_position_embeddings")
        assert length in (None, read.get_text_config().max_position_embeddings), method
