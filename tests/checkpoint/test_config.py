import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_clex.checkpoint.config import is_ours, normalise_config, set_tied
from mlx_clex.errors import InputError
from mlx_clex.model.own_rope import original_length

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
def test_log_scale_follows_the_family_of_the_release(family, outer, expected):
    """The Mixtral and Phi code of the release ignores a log_scale of true."""
    config = OLD_CLEX | {"model_type": family}
    if outer is not None:
        config["log_scale"] = outer

    normal = normalise_config(config)

    assert normal["rope_scaling"]["log_scale"] is expected
    assert "log_scale" not in normal


def test_a_converted_config_keeps_its_log_scale():
    """The family's default replaced the log_scale of a converted config."""
    scaling = {"type": "clex", "max_factor": 4, "log_scale": False}

    normal = normalise_config({"model_type": "llama", "rope_scaling": scaling})

    assert normal["rope_scaling"]["log_scale"] is False


def test_transformers_5_spelling_is_understood():
    """A CLEX checkpoint that transformers 5 has saved has only rope_parameters."""
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


def test_plain_rope_parameters_mean_no_scaling():
    """rope_type "default" was kept as the name of a method."""
    config = normalise_config({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})

    assert config == {"rope_theta": 1e6}


def test_rope_scaling_wins_over_plain_rope_parameters():
    """A method in rope_scaling was overwritten by the default in rope_parameters."""
    config = normalise_config(
        {
            "rope_parameters": {"type": "default", "rope_theta": 1e5},
            "rope_scaling": {"rope_type": "ntk", "factor": 2.0},
        }
    )

    assert config == {"rope_theta": 1e5, "rope_scaling": {"type": "ntk", "factor": 2.0}}


def test_settings_per_layer_type_stay_untouched():
    """Some classes read one entry for each layer type, which must not be merged."""
    per_layer = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}

    config = {"model_type": "mellum", "rope_parameters": per_layer}
    assert normalise_config(config)["rope_parameters"] == per_layer


def test_gpt_neox_names_and_ours_agree():
    """mlx-lm's gpt_neox reads rotary_emb_base, the rest of mlx_clex reads rope_theta."""
    old = normalise_config(
        {"model_type": "gpt_neox", "rotary_emb_base": 25_000, "rotary_pct": 0.25}
    )
    new = normalise_config(
        {
            "model_type": "gpt_neox",
            "rope_parameters": {"rope_theta": 25_000, "partial_rotary_factor": 0.25},
        }
    )

    assert old["rope_theta"] == new["rope_theta"] == new["rotary_emb_base"] == 25_000.0
    assert old["partial_rotary_factor"] == new["rotary_pct"] == 0.25


def test_mixtral_and_unknown_families_keep_their_base():
    """A family with another default base must not get a base of 10000."""
    assert normalise_config({"model_type": "mixtral"})["rope_theta"] == 1e6
    assert "rope_theta" not in normalise_config({"model_type": "gemma3_text"})


def test_yarn_configs_of_others_stay_as_published():
    """They were taken over as this project's yarn, which ignores mscale and the like."""
    published = {
        "max_position_embeddings": 131_072,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32_768,
            "mscale": 0.7,
        },
    }
    config = normalise_config(published)
    assert config["max_position_embeddings"] == 131_072
    assert config["rope_scaling"] == published["rope_scaling"]
    assert not is_ours(config, "yarn")
    assert original_length(config) == 32_768


def test_an_entry_that_transformers_refuses_has_a_key_of_its_own():
    """transformers checks rope_scaling of phi3 when it reads the tokenizer."""
    config = normalise_config({"mlx_clex_rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert config["rope_scaling"] == {"type": "yarn", "factor": 2.0}
    assert is_ours(config, "yarn")


@pytest.mark.parametrize(("has_head", "same"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("given", [None, True, False])
def test_the_head_in_the_file_decides(given, has_head, same):
    """`load` was off by 7.0 in a logit where tie_word_embeddings was absent or wrong."""
    config = {} if given is None else {"tie_word_embeddings": given}
    set_tied(config, has_head=has_head, same=same)
    if has_head and not same:
        assert config["tie_word_embeddings"] is False
    elif given is None:
        assert config["tie_word_embeddings"] is not has_head
    else:
        assert config["tie_word_embeddings"] is given


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ([1], "holds a list"),
        ({"rope_scaling": "clex"}, "rope_scaling = 'clex'"),
        ({"rope_scaling": {"factor": 2.0}}, "without a type"),
        ({"rope_scaling": {"type": 5}}, "must be a name, got 5"),
        ({"rope_theta": "10000"}, "rope_theta = '10000'"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"rope_theta": True}, "rope_theta = True"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings = inf"),
        ({"max_position_embeddings": 2048.5}, "max_position_embeddings = 2048.5"),
    ],
)
def test_unusable_settings_are_named(config, text):
    """A bad value caused a traceback later; the error must name it."""
    with pytest.raises(InputError, match=re.escape(text)) as caught:
        normalise_config(config)

    assert "\n" not in str(caught.value)


_leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_rope_keys = st.sampled_from(
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
def test_normalising_twice_changes_nothing_more(config):
    """Any config must be refused or be normal after one pass."""
    try:
        once = normalise_config(config)
    except InputError:
        return

    assert json.dumps(normalise_config(once), sort_keys=True) == json.dumps(once, sort_keys=True)


@pytest.mark.parametrize("base", [10**400, float("inf"), 1, True, "1e4"])
def test_a_base_that_float32_cannot_hold_is_refused(base):
    """A whole number of 400 digits ended in an OverflowError."""
    with pytest.raises(InputError, match=r"rope_theta = .* above 1 and below 1e"):
        normalise_config({"rope_theta": base})


@pytest.mark.parametrize("where", ["top", "text_config"])
@pytest.mark.parametrize("inside", [None, 1024])
def test_yarn_without_the_length_before_stretching_takes_transformers_own(where, inside):
    """mlx-lm silently assumes 4,096 tokens; transformers uses max_position_embeddings."""
    entry = {"rope_type": "yarn", "factor": 4.0}
    if inside:
        entry["original_max_position_embeddings"] = inside
    text = {"model_type": "llama", "max_position_embeddings": 32768, "rope_scaling": entry}
    config = text if where == "top" else {"model_type": "mistral3", "text_config": text}

    normal = normalise_config(config)

    normal = normal if where == "top" else normal["text_config"]
    assert normal["rope_scaling"]["original_max_position_embeddings"] == (inside or 32768)
    assert normalise_config(config) == normalise_config(normalise_config(config))


def test_names_of_early_checkpoints():
    """Phi-3's first configs say su, and Vicuna's longer length has a key of its own."""
    su = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    phi = {"model_type": "phi3", "original_max_position_embeddings": 4096, "rope_scaling": su}
    vicuna = {
        **{"model_type": "llama", "max_position_embeddings": 4096, "max_sequence_length": 16384},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }

    assert normalise_config(phi)["rope_scaling"] == {
        **su, "type": "longrope", "original_max_position_embeddings": 4096,
    }  # fmt: skip
    assert normalise_config(vicuna)["max_position_embeddings"] == 16384
    assert original_length(normalise_config(vicuna)) == 4096


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mistral", {"rope_theta": 1e9}),
        ("ministral3", {}),  # its class reads rope_parameters
    ],
)
def test_rope_parameters_of_a_text_config_reach_mlx_lms_class(family, expected):
    """Mistral Small 3 lost its base of 1e9 when transformers 5 had saved its config."""
    text = {"model_type": family, "rope_parameters": {"rope_theta": 1e9, "rope_type": "default"}}

    normal = normalise_config({"model_type": "mistral3", "text_config": text})["text_config"]

    added = {"max_position_embeddings"}
    assert {k: v for k, v in normal.items() if k not in added and k not in text} == expected
    assert normal["rope_parameters"] == text["rope_parameters"]


def test_infinities_of_transformers_5_are_numbers():
    """Granite 4 has a limit without an end; JSON has no word for it."""
    given = {"model_type": "granitemoehybrid", "time_step_limit": [0.0, {"__float__": "Infinity"}]}

    assert normalise_config(given)["time_step_limit"] == [0.0, float("inf")]
