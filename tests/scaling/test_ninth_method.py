"""A new method needs one file and one line; all other code uses the table."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_clex.scaling import SCALINGS

from ..conftest import GOLDEN, stock_folder

ROOT = Path(__file__).parents[2]
OUTSIDE = [
    path
    for folder in ("mlx_clex", "convert")
    for path in (ROOT / folder).rglob("*.py")
    if "scaling" not in path.relative_to(ROOT).parts[:2]
]
METHOD = '''
"""Frequencies divided by the square root of the scale; the scale follows the text."""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlx_clex.scaling import SCALINGS
from mlx_clex.scaling.base import Scaling
from mlx_clex.scaling.config import option
from mlx_clex.scaling.procedure import SKIPS, UNIFORM, Procedure


@dataclass(frozen=True, kw_only=True)
class RootConfig:
    """The reach."""

    stretch: int = option(8, "Longest length / trained length.")


class Root(Scaling):
    """Slows all pairs by the square root of the scale."""

    name: ClassVar[str] = "root"
    Config: ClassVar[type] = RootConfig
    hard_reach: ClassVar[bool] = True
    released_procedure: ClassVar[Procedure] = Procedure(scale_draw=UNIFORM, sampling=SKIPS)

    def scale_at(self, length):
        """ceil(length / L0)."""
        return float(max(1, -(-length // self.trained_length)))

    @property
    def reach(self):
        """L0 * stretch."""
        return self.trained_length * self.config.stretch

    def _solve(self, scale, layer):
        return self._base_inv_freq() / np.sqrt(scale)


SCALINGS[Root.name] = Root
'''
COMMANDS = [
    ["convert", "--hf-path", "stock", "--mlx-path", "root", "--scaling", "root", "--stretch", "4"],
    ["generate", "--model", "root", "--prompt", "a b c", "--max-tokens", "3"],
    ["doctor", "root"],
    ["plot", "frequencies", "--model", "root", "--output", "root.png"],
    [
        *["lora", "--train", "--model", "stock", "--scaling", "root", "--stretch", "4"],
        *["--data", "texts", "--iters", "2", "--batch-size", "1", "--max-seq-length", "32"],
        *["--num-layers", "1", "--val-batches", "1"],
    ],
]


def test_a_ninth_method_runs_in_every_command(tmp_path):
    """Eight files had tables with names of methods, or checked for settings of a method."""
    stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512, max_position_embeddings=64)
    (tmp_path / "ninth.py").write_text(METHOD)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words to train on\n" * 200)
    for name, *arguments in COMMANDS:
        module = f"mlx_clex.{name}" + (".__main__" if name == "convert" else "")
        code = (
            f"import ninth, importlib, sys; sys.argv = ['{name}', *sys.argv[1:]]; "
            f"sys.exit(importlib.import_module('{module}').main())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"
        if name == "doctor":
            assert "root (stretch 4)" in done.stdout
            assert "256 tokens; longer texts are refused" in done.stdout
    assert (tmp_path / "root.png").stat().st_size > 1000
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_table_knows_the_methods(path):
    """Code that compares a method's name would not work for a new method."""
    names = SCALINGS.keys() - {"none"}
    for node in ast.walk(ast.parse(path.read_text())):
        texts = []
        if isinstance(node, ast.Compare):
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
        elif isinstance(node, ast.Dict):
            texts = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        elif isinstance(node, ast.Attribute) and node.attr in FIELDS:
            inner = node.value
            sniffed = isinstance(inner, ast.Attribute) and inner.attr == "config"
            assert not sniffed, f"{path}:{node.lineno} reads config.{node.attr} of a method"
        hit = names.intersection(text for text in texts if isinstance(text, str))
        assert not hit, f"{path}:{node.lineno} names {', '.join(hit)}"


FIELDS = {
    name for method in SCALINGS.values() for name in vars(method.Config)["__dataclass_fields__"]
}
