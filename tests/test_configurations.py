"""Every cell of the second table of docs/families.md.

One checkpoint of each family is fine-tuned and merged. MLX_CLEX_TRAIN_ALL=1 takes all of them.
"""

import functools
import gc
import inspect
import os
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models import base

from .configuration_table import EXCEPTIONS, RUNS, expected, row
from .published_configs import CONFIGS

SIGNATURE = functools.cache(inspect.signature)
TRAIN_ALL = bool(os.environ.get("MLX_CLEX_TRAIN_ALL"))
TRAINED = {CONFIGS[name]["config"]["model_type"]: name for name in reversed(RUNS)}


@pytest.fixture(autouse=True)
def _cheaper(monkeypatch, tmp_path):
    """Leave out what takes time and changes no answer.

    Conversions collect garbage, MLX compiles kernels, and mlx-lm inspects a class for every key.
    """
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(base, "inspect", SimpleNamespace(signature=SIGNATURE))
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_published_configuration_goes_all_the_way(name, tmp_path):
    """Granite 4 did not load; Mixtral, Gemma and gpt-oss could not be trained with a scaling."""
    train = TRAIN_ALL or name in TRAINED.values() or name in EXCEPTIONS
    found = row(name, tmp_path, train=train)
    assert found == {column: cell for column, cell in expected(name).items() if column in found}
    assert ("lora, fuse" in found) == train
