"""Every command keeps the weights in memory on a Mac."""

import importlib

import mlx.core as mx
import pytest

from mlx_clex.__main__ import NAMES
from mlx_clex.commands.run_command import run_command


def test_a_command_sets_the_limit_before_it_runs(monkeypatch):
    """`perplexity` and three others read at half the speed: macOS swapped weights out."""
    seen = []
    info = {"max_recommended_working_set_size": 11 << 30}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: seen.append(size))
    status = run_command(
        lambda parser: None, lambda args: seen.append("run"), prog="x", description="", argv=[]
    )
    assert (status, seen) == (0, [11 << 30, "run"])


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_started_like_this(name, monkeypatch):
    """A command that parsed its options itself would not set the limit."""
    package = "mlx_clex.convert.__main__" if name == "convert" else f"mlx_clex.{name}"
    module = importlib.import_module(package)
    started = []
    shared = importlib.import_module("mlx_clex.commands.run_command")
    monkeypatch.setattr(shared, "run_command", lambda *_, **__: started.append(name) or 7)
    assert (module.main(), started) == (7, [name])
