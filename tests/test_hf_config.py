import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_clex.errors import InputError
from mlx_clex.hf_config import normalise_config

OLD_CLEX: dict[str, Any] = {  # the keys of a CLEX config of October 2023
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "auto_map": {"AutoConfig": "configuration_clex.CLEXLlamaConfig"},
    "rope_scaling": {"type": "clex", "max_factor": 16, "param_factor": 1, "factor": 1},
}


def test_an_old_clex_config_gets_the_defaults_of_its_release():
    """Without act and time_dt the network must be the SiLU one."""
    config = normalise_config(OLD_CLEX)

    assert config["rope_scaling"] == {
        "type": "clex",
        "max_factor": 16,
        "param_factor": 1,
        "factor": 1,
        "act": "silu",
        "time_dt": 0.01,
        "log_scale": True,
    }
    assert config["rope_theta"] == 10_000.0
    assert "auto_map" not in config
    assert "auto_map" in OLD_CLEX


@pytest.mark.parametrize(
    ("family", "outer", "expected"),
    [
        ("llama", None, True),
        ("llama", False, False),
        ("llama", True, True),
        ("mixtral", True, False),
        ("phi", True, False),
        ("qwen2", None, False),
    ],
)
def test_log_scale_is_what_the_family_made_of_it(family, outer, expected):
    """The Mixtral and Phi code of the release ignores a log_scale of true."""
    config = OLD_CLEX | {"model_type": family}
    if outer is not None:
        config["log_scale"] = outer

    normal = normalise_config(config)

    assert normal["rope_scaling"]["log_scale"] is expected
    assert "log_scale" not in normal


def test_log_scale_of_a_converted_config_wins():
    """A converted config keeps its own log_scale, whatever the family assumes."""
    scaling = {"type": "clex", "max_factor": 4, "log_scale": False}

    normal = normalise_config({"model_type": "llama", "rope_scaling": scaling})

    assert normal["rope_scaling"]["log_scale"] is False


def test_transformers_5_spelling_is_understood():
    """A CLEX folder saved again by transformers 5 has only rope_parameters."""
    new = dict(OLD_CLEX)
    new["rope_parameters"] = {
        **new.pop("rope_scaling"),
        "rope_type": "clex",
        "rope_theta": 500_000,
        "partial_rotary_factor": 0.5,
    }

    config = normalise_config(new)

    assert config["rope_theta"] == 500_000.0
    assert config["partial_rotary_factor"] == 0.5
    assert config["rope_scaling"] == normalise_config(OLD_CLEX)["rope_scaling"]
    assert "rope_parameters" not in config


def test_plain_rope_keys = st.sampled_from(
    ["type", "rope_type", "factor", "rope_theta", "log_scale", "act", "max_factor"]
)
_keys = st.sampled_from(
    [
        *("model_type", "rope_scaling", "rope_parameters", "rope_theta", "log_scale"),
        *("max_position_embeddings", "rotary_emb_base", "rotary_pct"),
    ]
)
_names = st.sampled_from(["clex", "gene", "yarn", "default", "llama", "gpt_neox"])
_value = _leaf | _names | st.dictionaries(_rope_keys, _leaf | _names)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_keys, _value))
def test_any_config_is_normal_after_one_pass_or_refused(config):
    """A second pass that changes the config means the first one missed something."""
    try:
        once = normalise_config(config)
    except InputError:
        return

    assert json.dumps(normalise_config(once), sort_keys=True) == json.dumps(once, sort_keys=True)
