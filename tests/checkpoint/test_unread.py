"""What mlx-lm does not read of a published rope is said, and nothing else is."""

import re

import pytest

from mlx_clex.checkpoint.config import base_config
from mlx_clex.checkpoint.unread import unread_settings
from mlx_clex.model_file import Model, ModelArgs

from ..published_configs import CONFIGS, scaled

# Differs under stock mlx-lm alone: its default of rope_theta is not that of transformers,
# which mlx_clex reads.
REPAIRED = {"minicpm3-4b"}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def notes(config):
    return unread_settings(base_config(config), Model(ModelArgs.from_dict(config)))


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if "mlx_lm_cannot" not in c])
def test_a_published_config_that_differs_from_transformers_is_told(name):
    """gpt-oss, Phi-3 and GLM-4 gave other answers than in transformers, with no warning."""
    differs = "rotations_differ" in CONFIGS[name] and name not in REPAIRED
    assert bool(notes(scaled(name))) == differs


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3-30b-a3b", {"rope_scaling": YARN}, r"ignores this model's rope_scaling \(yarn\)"),
        ("gemma-7b", {"rope_scaling": YARN}, r"ignores this model's rope_scaling \(yarn\)"),
        ("llama-2-7b", {"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor"),
        ("llama-2-7b", {"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        ("glm-4-9b-chat", {}, "partial_rotary_factor 0.5 .* all 128 dimensions"),
        ("phi-3.5-mini", {}, "long_factor .* up to 4096 tokens"),
    ],
)
def test_the_note_names_the_setting(name, changes, words):
    """The user has to find the setting in config.json."""
    (note,) = notes(scaled(name) | changes)
    assert re.search(words, note)
    assert note.endswith("the answers differ from those in transformers.")


@pytest.mark.parametrize("changes", [{"factor": 1.0}, {"attention_factor": 1.1386294}])
def test_a_setting_without_an_effect_is_not_told(changes):
    """A note that changes nothing trains people to skip notes."""
    assert notes(scaled("llama-2-7b") | {"rope_scaling": YARN | changes}) == []
