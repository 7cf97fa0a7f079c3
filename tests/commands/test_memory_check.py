"""Runs that do not fit are told of before they begin, and refused where they would end badly."""

import json

import pytest

from mlx_clex.checkpoint.sizes import Held
from mlx_clex.commands.memory_check import MemoryCheck
from mlx_clex.diagnosis.machine import described
from mlx_clex.diagnosis.memory import Training
from mlx_clex.errors import InputError

from ..diagnosis.test_memory import LLAMA_7B


@pytest.fixture
def check(tmp_path):
    """A function from memory to a check of a LLaMA 7B of 13.5 GB on a Mac."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))

    def make(memory, *, force=False):
        return MemoryCheck(tmp_path, force=force, machine=described(memory, "metal"))

    return make


def test_a_run_that_fits_says_nothing(check, capsys):
    """Most runs fit."""
    check(64e9).reading(4096, step=2048)
    assert capsys.readouterr().err == ""


def test_a_tight_run_is_warned_of_once(check, capsys):
    """With what helps, in one line."""
    checking = check(24e9)
    for _ in range(2):
        checking.reading(16384, step=2048)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Reading and continuing 16,384 tokens is expected to need" in error
    assert "MLX can use 16.00 GB of the 24.00 GB here" in error
    assert "with --prefill-step-size 512 --kv-bits 4" in error


def test_a_run_of_much_more_than_the_memory_is_refused(check, capsys):
    """On a Mac it could end in a kernel panic; --force runs it anyway."""
    run = Training(length=16384)
    with pytest.raises(InputError, match=r"Training .* --force runs it anyway"):
        check(32e9)(run, "Training on 16,384 tokens")
    check(32e9, force=True)(run, "Training on 16,384 tokens")
    assert "is expected to need" in capsys.readouterr().err


def test_a_model_that_cannot_be_built_is_left_to_loading(tmp_path):
    """The check must not hide the better message of `load`."""
    (tmp_path / "config.json").write_text("{}")
    MemoryCheck(tmp_path, force=False).reading(10**9, step=2048)
    MemoryCheck("owner/name", force=False).reading(10**9, step=2048)


@pytest.mark.parametrize("command", ["generate", "lora", "chat", "server"])
def test_commands_refuse_before_they_load(command, tmp_path, monkeypatch, capsys):
    """Each command that loads a model for long texts has the check."""
    import importlib
    import sys

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    options = {"lora": ["--train", "--data", str(tmp_path)]}.get(command, [])
    monkeypatch.setattr(
        "mlx_clex.commands.memory_check.this_machine", lambda: described(4e9, "metal")
    )
    monkeypatch.setattr(
        "mlx_clex.diagnosis.source.held_by_files", lambda folder: Held.in_bytes(1 << 40)
    )
    monkeypatch.setattr("mlx_clex.loading.needs_conversion", lambda *_: False)
    monkeypatch.setattr(sys, "argv", [command, "--model", str(tmp_path), *options])
    assert importlib.import_module(f"mlx_clex.{command}").main() == 2
    assert "--force runs it anyway" in capsys.readouterr().err
