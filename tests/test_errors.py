"""Errors are one line, and those of MLX say what helps."""

import pytest

from mlx_clex.errors import InputError, RunError, generating, one_line
from mlx_clex.training.ranks import Ranks


@pytest.mark.parametrize("text", ["Caused GPU Timeout Error (00000002)", "Impacting Interactivity"])
def test_the_watchdog_of_macos_is_told_apart_from_a_lack_of_memory(text):
    """A long step on a Mac ended with the advice to use less memory."""
    with pytest.raises(RunError, match="display off"), Ranks().running():
        raise RuntimeError(f"[METAL] Command buffer execution failed: {text}")
    with pytest.raises(RunError, match="--prefill-step-size 512"), generating(lambda: "at 3"):
        raise RuntimeError(f"[METAL] Command buffer execution failed: {text}")
    with pytest.raises(RunError, match="If memory was short"), Ranks().running():
        raise RuntimeError("[METAL] Insufficient Memory")


@pytest.mark.parametrize(
    "error",
    [ValueError("[quantize] bad group"), NotImplementedError("RotatingKVCache Quantization NYI")],
)
def test_a_cache_that_cannot_be_quantised_is_an_error_of_the_options(error):
    """A cache of a window was "MLX failed", with exit status 1, in all commands but one."""
    with pytest.raises(InputError, match="cannot be quantised"), generating(lambda: "at 3"):
        raise error


def test_control_characters_of_a_file_are_escaped():
    """An escape sequence in a tensor's name could rewrite the terminal."""
    assert one_line(ValueError("a \x1b[2J b\n c")) == r"a \x1b[2J b c"
