"""Published configurations on mlx-lm and transformers, before anything of ours is attached."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer
from transformers import CONFIG_MAPPING

from mlx_clex.model_file import Model, ModelArgs

from .published_configs import (
    CONFIGS,
    LENGTH,
    VOCABULARY,
    build,
    differences,
    published,
    scaled,
    text_config,
    tiny_folder,
)

RUNS = [name for name, entry in CONFIGS.items() if "mlx_lm_cannot" not in entry]
COMPARED = [name for name in RUNS if "not_compared" not in CONFIGS[name]]
FAMILIES = {CONFIGS[name]["config"]["model_type"]: name for name in reversed(RUNS)}

# What decides the rotation and the pattern of layers; no scaling may touch it.
KEPT = (
    "head_dim",
    "layer_norm_eps",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "qk_rope_head_dim",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_dim",
    "rotary_pct",
    "sliding_window",
    "sliding_window_pattern",
)


@pytest.fixture(autouse=True)
def _no_compiler():
    """MLX's CPU kernels take a C++ compiler; these models are too small for that."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def _ids() -> mx.array:
    return mx.random.randint(3, VOCABULARY, (2, LENGTH), key=mx.random.key(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_scaled_config_keeps_the_rotation(name):
    """A tiny model with another rotation would test a checkpoint that nobody has."""
    full, tiny = text_config(published(name)), text_config(scaled(name))
    assert {key: tiny.get(key) for key in KEPT} == {key: full.get(key) for key in KEPT}

    def head_dim(config):
        width = config.get("hidden_size", config.get("n_embd"))
        heads = config.get("num_attention_heads", config.get("n_head", 8))
        return config.get("head_dim", width // heads)

    free = {"gemma3_text", "deepseek_v2", "deepseek_v3", "kimi_k2", "minicpm3"}
    if tiny["model_type"] not in free and tiny.get("position_embedding_type") != "nope":
        assert head_dim(tiny) == head_dim(full)
    assert set(tiny.get("layer_types", [])) == set(full.get("layer_types", []))


@pytest.mark.parametrize("name", RUNS)
def test_mlx_lm_runs_the_scaled_config(name):
    """The configuration table may only promise what mlx-lm itself can run."""
    model = build(scaled(name))

    logits = model(_ids())

    assert logits.shape == (2, LENGTH, VOCABULARY)
    assert logits.dtype == mx.float32
    assert mx.isfinite(logits).all()
    parameters = sum(weight.size for _, weight in tree_flatten(model.parameters()))
    assert parameters < 1_200_000


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - set(RUNS)))
def test_mlx_lm_still_cannot(name):
    """A reason that no longer holds hides a checkpoint that could be served."""
    kind, _, reason = CONFIGS[name]["mlx_lm_cannot"].partition(": ")
    with pytest.raises((Exception, SystemExit)) as caught:
        build(scaled(name))
    assert type(caught.value).__name__ == kind
    assert kind == "SystemExit" or reason in str(caught.value)


@pytest.mark.parametrize("name", COMPARED)
def test_rotation_differs_from_transformers_as_recorded(name):
    """doctor tells users where mlx-lm and transformers part; its facts must not age."""
    assert differences(name) == CONFIGS[name].get("rotations_differ", {})


@pytest.mark.parametrize("name", sorted(set(RUNS) - set(COMPARED)))
def test_transformers_still_lacks_the_family(name):
    """A family that transformers has gained has to be compared."""
    assert differences(name) is None


# transformers tells of a rope_scaling in a family that it does not know.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES.values())
def test_tiny_folder_is_a_whole_checkpoint(name, tmp_path):
    """mlx-lm reads the folder back to the same model, and its tokenizer with it."""
    folder = tiny_folder(name, tmp_path / name)

    model, _ = load_model(folder)

    ids = _ids()
    assert mx.allclose(model(ids), build(scaled(name))(ids), atol=1e-5)
    if reason := CONFIGS[name].get("tokenizer_cannot"):
        with pytest.raises(AttributeError, match=reason.partition(": ")[2]):
            load_tokenizer(folder)
        return
    tokens = load_tokenizer(folder).encode("text of any kind")
    assert tokens
    assert max(tokens) < VOCABULARY


def test_every_entry_says_where_it_comes_from():
    """Facts without a source cannot be checked; unsure ones must be marked."""
    assert len(RUNS) >= 40
    for name, entry in CONFIGS.items():
        assert entry["hub_id"], name
        assert entry["source"], name
        assert set(entry) <= {
            "hub_id",
            "source",
            "note",
            "unverified",
            "config",
            "mlx_lm_cannot",
            "not_compared",
            "tokenizer_cannot",
            "rotations_differ",
        }
        unsure = {field.partition(".")[0] for field in entry.get("unverified", [])}
        absent = {"hub_id", "head_dim", "rope_scaling"}  # a key that may be published, too
        assert unsure <= entry["config"].keys() | absent, name


@pytest.mark.parametrize(
    "name", [name for name in RUNS if CONFIGS[name]["config"]["model_type"] in CONFIG_MAPPING]
)
def test_a_config_that_transformers_5_saved_is_the_same_model(name):
    """It writes rope_parameters, which most classes of mlx-lm do not read: theta was lost."""
    config = scaled(name)
    family = CONFIG_MAPPING[config["model_type"]]
    saved = json.loads(family.from_dict(scaled(name)).to_json_string(use_diff=True))
    model = Model(ModelArgs.from_dict(config))
    again = Model(ModelArgs.from_dict(saved | {"model_type": config["model_type"]}))

    again.update(model.parameters())

    assert mx.allclose(again(_ids()), model(_ids()), atol=1e-5)
