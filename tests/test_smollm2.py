"""A real model, from its GGUF file to an answer: SmolLM2-135M-Instruct.

`python examples/fetch_smollm2.py build/smollm2` fetches it; MLX_CLEX_SMOLLM2 may name the
file elsewhere.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
L0 = 512  # trained length the conversion is told, tokens; far below the real one


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2, converted with fresh CLEX weights."""
    gguf = Path(os.environ.get("MLX_CLEX_SMOLLM2", ROOT / "build" / "smollm2" / FILE))
    if not gguf.is_file():
        pytest.skip(f"{FILE} is not there: run examples/fetch_smollm2.py build/smollm2")
    folder = tmp_path_factory.mktemp("smollm2") / "clex"
    run(
        *("mlx_clex.convert", "--hf-path", gguf, "--mlx-path", folder, "--dtype", "float32"),
        *("--scaling", "clex", "--trained-length", L0),
    )
    return folder


def run(module: str, *options) -> str:
    command = [sys.executable, "-m", module, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_a_question(smollm2):
    """Queries and keys of the GGUF file stayed permuted, and the model talked nonsense."""
    answer = run(
        *("mlx_clex.generate", "--model", smollm2, "--max-tokens", 12, "--temp", 0),
        *("--prompt", "What is the capital of France?"),
    )

    assert "Paris" in answer


def test_finds_a_fact_past_the_trained_length(smollm2, tmp_path):
    """A prompt of two trained lengths was read at the scale of one."""
    file = tmp_path / "document.txt"
    command = [sys.executable, ROOT / "examples" / "long_document.py", "--characters", "3200"]
    file.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)

    answer = run(
        *("mlx_clex.generate", "--model", smollm2, "--max-tokens", 20, "--temp", 0),
        *("--prompt-file", file, "--prompt", "What is the secret word of the library?"),
    )

    assert "banana" in answer
