"""What the README says to type must work as it is typed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from .conftest import GOLDEN

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- test -->\n```(bash|python)\n(.*?)```", re.DOTALL)


def test_readme_blocks_run_in_order(tmp_path):
    """A command in the README had an option that does not exist."""
    _make_base_model(tmp_path / "base-model")
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) >= 5

    home = {"HOME": str(tmp_path)}  # where conversions and texts are kept

    for language, code in blocks:
        command = ["bash", "-euo", "pipefail", "-c", code]
        if language == "python":
            command = [sys.executable, "-c", code]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | home,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def _make_base_model(folder: Path) -> None:
    """A tiny plain LLaMA in mlx-lm's format, out of a golden checkpoint."""
    source = GOLDEN / "clex_llama_gqa_log_scale"
    folder.mkdir()
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_scaling", "auto_map", "log_scale"):
        config.pop(key)
    config["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    weights: dict[str, Any] = {}
    for shard in source.glob("model-*.safetensors"):
        loaded: Any = mx.load(str(shard))
        weights |= loaded
    plain = {name: tensor for name, tensor in weights.items() if "clex_layer" not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), plain, metadata={"format": "pt"})


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))
def test_readme_links_lead_somewhere(target):
    """A link in the README pointed to a file that had moved."""
    assert (README.parent / target).exists()
