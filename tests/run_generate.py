"""Runs generate several times in one process, so that a test under mlx.launch starts it once.

Each process writes (status, stdout, stderr) of every run to its own file.
"""

import io  # noqa: I001 - mlx_clex comes first, so that OpenBLAS is found
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import mlx_clex  # noqa: F401
import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_clex import generate


def main(folder: str) -> None:
    """Run the commands in `runs.json`."""
    results = []
    for argv in json.loads((Path(folder) / "runs.json").read_text()):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = generate.main(argv)
        # mlx-lm computes a token ahead. What it sends must not meet what the next run sends.
        mx.synchronize(generation_stream)
        results.append((status, out.getvalue(), err.getvalue()))
    rank = mx.distributed.init().rank()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
