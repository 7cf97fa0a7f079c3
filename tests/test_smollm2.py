"""A real model, from its GGUF file to an answer: SmolLM2-135M-Instruct.

`python examples/fetch_smollm2.py build/smollm2` fetches it; MLX_CLEX_SMOLLM2 may name the
file elsewhere.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from .checkpoints import torch_cache

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


def test_perplexity_is_that_of_transformers(smollm2, tmp_path):
    """A plain loop over the same weights; at scale 1 fresh CLEX is the base model.

    MLX_CLEX_LENGTHS="1024 2048 4096" takes the long way.
    """
    lengths = [int(length) for length in os.environ.get("MLX_CLEX_LENGTHS", "96 192").split()]
    text = tmp_path / "text.txt"
    text.write_bytes((ROOT / "README.md").read_bytes() * 2)
    options = ("--data", text, "--windows", 1, "--scale", 1, "--json", "--lengths", *lengths)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    ids = torch.tensor([tokenizer.encode(text.read_text())[: max(lengths)]])
    plain = tmp_path / "plain"
    shutil.copytree(smollm2, plain)
    config = json.loads((plain / "config.json").read_text()) | {"rope_scaling": None}
    (plain / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)

    for protocol, chunk in (("whole", None), ("chunked", 64)):
        chunks = ("--chunk", chunk) if chunk else ()
        out = run(
            "mlx_clex.perplexity", "--model", smollm2, "--protocol", protocol, *chunks, *options
        )
        for row in json.loads(out)["results"]:
            cache, losses = torch_cache(model), []
            for part in ids[:, : row["length"]].split(chunk or row["length"], dim=1):
                with torch.no_grad():
                    found = model(part, **cache, use_cache=True)
                flat = found.logits[0, :-1], part[0, 1:]
                losses.append(torch.nn.functional.cross_entropy(*flat, reduction="none"))
            theirs = math.exp(torch.cat(losses).mean())
            print(protocol, row["length"], row["perplexity"], theirs)
            assert row["tokens"] == sum(map(len, losses))
            assert math.isclose(row["perplexity"], theirs, rel_tol=1e-3)
