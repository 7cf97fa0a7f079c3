"""Runs that do not fit are told of before they begin, and refused where they would end badly."""

import importlib
import json
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_clex import bundled, load
from mlx_clex.commands.memory_check import MemoryCheck
from mlx_clex.diagnosis.machine import described
from mlx_clex.diagnosis.memory import Training
from mlx_clex.diagnosis.source import build, find_source
from mlx_clex.errors import InputError

from ..diagnosis.test_memory import LLAMA_7B


@pytest.fixture
def check(tmp_path):
    """A function from memory to a check of a LLaMA 7B of 13.5 GB on a Mac."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))

    def make(memory, *, force=False, **options):
        checking = MemoryCheck(force=force, machine=described(memory, "metal"), **options)
        model = build(find_source(tmp_path))
        model.set_dtype(mx.float16)
        checking.at_load(lambda: None)(model)
        return checking

    return make


def test_a_run_that_fits_says_nothing(check, capsys):
    """Most runs fit."""
    left = check(64e9).reading(4096, step=2048)
    assert 0 < left < 48e9 - 13.5e9, "what MLX can use there, less the weights"
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
    assert "with --prefill-step-size 512 --kv-bits 4 --quantized-kv-start 0" in error


def test_only_options_that_a_command_has_are_advised(check, capsys):
    """chat and web were told of --kv-bits, which they do not have."""
    check(24e9, kv_bits=False).reading(16384, step=2048)
    error = capsys.readouterr().err
    assert error.endswith("16,384 tokens do not fit; 4,352 do with --prefill-step-size 512.\n")


def test_a_run_of_much_more_than_the_memory_is_refused(check, capsys):
    """On a Mac it could end in a kernel panic; --force runs it anyway."""
    run = Training(length=16384)
    with pytest.raises(InputError, match=r"Training .* --force runs it anyway"):
        check(32e9)(run, "Training on 16,384 tokens")
    check(32e9, force=True)(run, "Training on 16,384 tokens")
    assert "is expected to need" in capsys.readouterr().err


def test_what_no_text_can_use_is_not_counted(capsys):
    """--max-tokens above CLEX's reach was refused, for memory that no answer could need."""
    check = MemoryCheck(force=False, machine=described(8e9, "metal"))
    load("bundled:clex", before_reading=check.at_load(lambda: None))
    assert check.reading(10**9, step=512) > 0
    load("bundled:gene", before_reading=check.at_load(lambda: None))
    with pytest.raises(InputError, match="1,000,000,000 tokens"):
        check.reading(10**9, step=512)


def test_a_model_without_sizes_loads():
    """A family whose config lacks a size must not be refused for it."""
    model = nn.Module()
    model.layers = []
    check = MemoryCheck(force=False)
    check.at_load(lambda: check.reading(10**9, step=2048))(model)


def test_processes_share_what_is_read(check, capsys):
    """A model too large for one machine was refused on two as well."""
    check(24e9, processes=2).reading(16384, step=512)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["generate", "lora", "chat", "server"])
def test_commands_refuse_before_they_read_weights(command, tmp_path, monkeypatch, capsys):
    """On one machine or the hub; lora and server did not check a model that the hub names."""
    (tmp_path / "a.txt").write_text("In the beginning")
    options = {"lora": ["--train", "--data", str(tmp_path)]}.get(command, [])
    monkeypatch.setattr(
        "mlx_clex.commands.memory_check.this_machine", lambda: described(2e6, "metal")
    )
    monkeypatch.setattr("mlx_clex.loading.check_finite", lambda model: pytest.fail("it was read"))
    monkeypatch.setattr("mlx_clex.loading._from_hub", lambda *_: bundled.FOLDER / "base")
    monkeypatch.setattr(sys, "argv", [command, "--model", "owner/name", *options])
    assert importlib.import_module(f"mlx_clex.{command}").main() == 2
    assert "--force runs it anyway" in capsys.readouterr().err
