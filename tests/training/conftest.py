"""A model, texts and a home directory for runs of fine-tuning."""

import mlx.core as mx
import pytest

from .commands import WORDS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home directory for the cache of tokens."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with train and valid texts."""
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 60), ("valid", 40), ("test", 20)):
        (folder / split).mkdir()
        (folder / split / "a.txt").write_text(WORDS * count)
    return folder


@pytest.fixture
def eager(home, monkeypatch):
    """Without compiling, which takes a C++ compiler seconds a kernel on the CPU."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # in processes started here
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def base(converted):
    """A converted CLEX checkpoint: L0 32, max_factor 8."""
    return converted("clex_llama")
