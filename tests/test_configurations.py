"""Every cell of the second table of docs/families.md."""

import gc

import mlx.core as mx
import pytest

from .configuration_table import EXCEPTIONS, RUNS, expected, row
from .published_configs import CONFIGS

TRAINED = {CONFIGS[name]["config"]["model_type"]: name for name in reversed(RUNS)}


@pytest.fixture(scope="module", autouse=True)
def _modules_are_no_garbage():
    """Each conversion collects garbage, which took a third of the time of these tests."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_published_configuration_goes_all_the_way(name, tmp_path, monkeypatch):
    """Granite 4 did not load; Mixtral, Gemma and gpt-oss could not be trained with a scaling."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train = name in TRAINED.values() or name in EXCEPTIONS
    mx.disable_compile()
    try:
        found = row(name, tmp_path, train=train)
    finally:
        mx.enable_compile()
    assert found == {column: cell for column, cell in expected(name).items() if column in found}
    assert ("lora, fuse" in found) == train
