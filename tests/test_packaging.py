"""What pyproject.toml lists must be what there is; a list by hand goes stale."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from mlx_clex.__main__ import NAMES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed():
    """`mlx_clex.training` was missing from the wheel, though it imported from the source."""
    there = set()
    for top, outer in (("mlx_clex", ()), ("convert", ("mlx_clex",))):
        for path in (ROOT / top).rglob("__init__.py"):
            there.add(".".join((*outer, *path.parent.relative_to(ROOT).parts)))

    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there


def test_every_command_has_a_console_script():
    """`mlx_clex.server` ran as a module only."""
    files = [*(ROOT / "mlx_clex").glob("*.py"), ROOT / "convert" / "__main__.py"]
    there = {file for file in files if "\nmain = command(" in file.read_text()}
    scripts = PROJECT["project"]["scripts"]

    assert scripts.pop("mlx_clex") == "mlx_clex.__main__:main"
    modules = {module.removesuffix(":main") for module in scripts.values()}
    assert modules == {
        f"mlx_clex.{file.stem}" if file.parent.name == "mlx_clex" else "mlx_clex.convert.__main__"
        for file in there
    }
    assert {f"mlx_clex.{name}" for name in NAMES} == scripts.keys()
    assert all(module.removesuffix(".__main__") in scripts for module in modules)


def test_commands_run_in_a_clone_that_was_installed_from(tmp_path):
    """`pip install .` and then `python -m mlx_clex.convert`, as the README says, in its folder."""
    for folder in ("mlx_clex", "convert"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    # -S: without what makes an editable install find the converter.
    code = (
        f"import sys; sys.path += {sys.path!r}; "
        "import mlx_clex, mlx_clex.convert; print(mlx_clex.convert.__file__)"
    )
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "convert" / "__init__.py"), done.stderr
