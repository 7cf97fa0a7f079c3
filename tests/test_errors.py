"""Errors of MLX say what helps."""

import pytest

from mlx_clex.errors import RunError, generating
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
