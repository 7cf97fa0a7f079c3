"""Imports point one way: each module knows only those before it."""

import ast
from pathlib import Path

import pytest

import mlx_clex

ORDER = [
    "scaling",
    "rotary",
    "cache",
    "families",
    "attach",
    "model_file",
    "sharding",
    "load",
    "convert",
    "plans",
    "fingerprint",
    "cache_file",
    "model_report",
    "training",
    "conversation",
    "results",
    "pictures",
    "reader",
    "harness",
    "commands",
]
COMMANDS = [
    "generate",
    "cache_prompt",
    "chat",
    "web",
    "server",
    "lora",
    "fuse",
    "perplexity",
    "compare",
    "passkey",
    "evaluate",
    "plot",
    "doctor",
]
ANYWHERE = {"errors", "_blas", "hf_config", "cli", "bundled"}
PACKAGE = Path(mlx_clex.__file__).parent
FILES = [
    path
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]
    if path.name != "__init__.py" and path.stem not in ANYWHERE
]


def rank(module):
    return ORDER.index("commands" if module in COMMANDS else module)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_module_imports_one_that_builds_on_it(path):
    """load -> convert inside a function is the one exception: it runs on demand."""
    inside = 1 if path.parent != PACKAGE else 0
    mine = path.parent.name if inside else path.stem
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == inside + 1:
            name = (node.module or "").split(".")[0]
            if name and name not in ANYWHERE:
                assert rank(name) <= rank(mine), f"{path.name} imports {name}"


def test_only_the_table_compares_method_names():
    """A new method must be one file and one line."""
    names = {"clex", "gene", "gene-param", "yarn", "ntk", "linear", "dynamic"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not constants & names, f"{path.name}:{node.lineno} compares a method name"
