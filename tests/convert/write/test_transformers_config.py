"""transformers reads every config.json that convert and fuse write, and the tokenizer with it."""

import json
import shutil

import pytest
from mlx_clex.convert.decide import _config, with_entry
from mlx_clex.convert.options import Options
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

from mlx_clex.checkpoint.config import OURS, normalise_config, read_by_transformers
from mlx_clex.checkpoint.sizes import Held
from mlx_clex.fuse import merged_config
from mlx_clex.scaling import build_scaling

from ...configuration_table import EXCEPTIONS, RUNS
from ...conftest import CONFIGS
from ...published_configs import CONFIGS as CONFIGURATIONS
from ...published_configs import scaled, text_config
from ...tiny_families import FAMILIES, L0
from ...tiny_families import config as tiny_config

METHODS = {name: entry for name, entry in CONFIGS.items() if name != "none"}  # it writes no entry
HELD = Held(1 << 40, 1 << 20)  # enough for any model
SHAPE = {"dims": 16, "base": 1e4, "heads": 4, "layers": 2}
PUBLISHED = {scaled(name)["model_type"]: name for name in RUNS if name not in EXCEPTIONS}
PLAIN = [name for name, each in FAMILIES.items() if not each.absent and not each.refused]

# Tiny configs that transformers refuses before anything is converted, and why.
REFUSED = {
    "granitemoehybrid": "its Mamba heads are half of what mamba_expand asks for",
    "minicpm3": "its longrope has one factor for all pairs, and transformers wants a list",
}


def plain(family):
    """Return a config that transformers reads as well."""
    config = tiny_config(family) | {"max_position_embeddings": L0}
    if config.get("sliding_window_pattern", ...) is None:
        config["sliding_window_pattern"] = 2
    if "type" not in (config.get("rope_scaling") or {}):
        config.pop("rope_scaling", None)
    return config


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    """Return a folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in converted("clex_llama").glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("name", [*PLAIN, *PUBLISHED.values()])
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_transformers_reads_what_convert_and_fuse_write(name, folder):
    """phi3 with any scaling, and yarn in sixteen more families, were written and never loaded."""
    source = scaled(name) if name in CONFIGURATIONS else plain(name)
    before = read_by_transformers(source)
    if source["model_type"] in CONFIG_MAPPING and before is None:
        assert name in REFUSED, "transformers refuses the tiny config"
        pytest.skip(REFUSED[name])
    assert name not in REFUSED
    for method, entry in METHODS.items():
        config = _config(source, HELD, Options(scaling={"type": method, **entry}), [])
        length = config["max_position_embeddings"]
        scaling = build_scaling(config["rope_scaling"], trained_length=length, **SHAPE)
        written = with_entry(config, scaling.entry())
        fused = normalise_config(merged_config(source, scaling, dropped=False))
        assert with_entry(fused, scaling.entry()) == written, method

        (folder / "config.json").write_text(json.dumps(written))
        assert AutoTokenizer.from_pretrained(folder).encode("text"), method
        if source["model_type"] in CONFIG_MAPPING:
            read = AutoConfig.from_pretrained(folder).get_text_config()
            allowed = [None, text_config(written).get("max_position_embeddings")]
            if hasattr(before.get_text_config(), "max_position_embeddings"):  # at another place
                allowed.append(before.get_text_config().max_position_embeddings)
            assert getattr(read, "max_position_embeddings", None) in allowed, method
        again = normalise_config(json.loads((folder / "config.json").read_text()))
        assert again["rope_scaling"] == scaling.entry(), method
        assert OURS not in again
