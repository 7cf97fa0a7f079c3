"""Errors are one line, and those of MLX say what helps."""

import pytest

from mlx_clex.errors import RunError, failed_after, generating, one_line
from mlx_clex.training.ranks import Ranks


@pytest.mark.parametrize("text", ["Caused GPU Timeout Error (00000002)", "Impacting Interactivity"])
def test_the_watchdog_of_macos_is_told_apart_from_a_lack_of_memory(text):
    """A long step on a Mac ended with the advice to use less memory."""
    with pytest.raises(RunError, match="display off"), Ranks().running():
        raise RuntimeError(f"[METAL] Command buffer execution failed: {text}")
    with pytest.raises(RunError, match="--prefill-step-size 512"), generating(lambda: "at 3"):
        raise RuntimeError(f"[METAL] Command buffer execution failed: {text}")
    chat = failed_after(3, RuntimeError(text))
    assert "after 3 tokens" in str(chat)
    assert "--prefill-step-size 512" in str(chat)
    with pytest.raises(RunError, match="If memory was short"), Ranks().running():
        raise RuntimeError("[METAL] Insufficient Memory")


def test_control_characters_of_a_file_are_escaped():
    """An escape sequence in a tensor's name could rewrite the terminal."""
    assert one_line(ValueError("a \x1b[2J b\n c")) == r"a \x1b[2J b c"
