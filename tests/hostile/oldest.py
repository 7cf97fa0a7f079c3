"""`make test-oldest`: the lowest versions that pyproject.toml allows.

Makes a virtual environment with exactly those versions of the dependencies, and runs there the
import of the package and the comparison with the published code's answers (tests/test_golden.py).

Run it as `python tests/hostile/oldest.py FOLDER`; it needs pip and an index.
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_BACK_END = {"linux": "cpu"}  # MLX's extra


def lowest(requirements: list[str]) -> list[str]:
    """Return requirements of exactly the lowest allowed versions."""
    found = []
    for text in requirements:
        match = re.match(r"([\w.\[\]-]+)>=([\d.]+)", text)
        if match is None:
            raise SystemExit(f"{text!r} in pyproject.toml has no lowest version.")
        found.append(f"{match[1]}=={match[2]}")
    return found


def main() -> None:
    """Install, import, compare, and exit."""
    folder = Path(sys.argv[1])
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = lowest(project["dependencies"])
    if sys.platform in _BACK_END:
        pins += lowest(extras[_BACK_END[sys.platform]])
    torch = [text for text in extras["dev"] if text.startswith("torch==")]
    tools = [text for text in extras["dev"] if text.startswith(("pytest", "hypothesis"))]
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *pins, *torch, *tools], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(_ROOT)], check=True)
    print("Lowest versions:", ", ".join(pins), flush=True)
    subprocess.run([python, "-c", "import mlx_clex; print(mlx_clex.load)"], check=True)
    tests = ["-q", "-p", "no:cacheprovider", "tests/test_golden.py"]
    sys.exit(subprocess.run([python, "-m", "pytest", *tests], cwd=_ROOT).returncode)


if __name__ == "__main__":
    main()
