"""Convert, generate, describe and fine-tune a model at full width, with random weights.

    python -m benchmarks.full_width llama-3.2-1b

The configuration is one of tests/data/configs.json. Prints time and peak memory of each command.
It needs twice the weights on the disk, and a little more than them in memory.

Not covered: quality, and speed on Metal.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import _get_classes, save_model

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "data" / "configs.json"
WORDS = ROOT / "mlx_clex" / "bundled" / "base"  # any tokenizer below the vocabulary will do


def make(name: str, folder: Path) -> None:
    """Write the checkpoint in float32, with random weights."""
    config = json.loads(CONFIGS.read_text())[name]["config"]
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    model_class, args_class = _get_classes(config)
    save_model(folder, model_class(args_class.from_dict(config)), donate_model=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WORDS / file, folder)


def measured(*argv: str) -> tuple[float, float]:
    """Run a command; return its time in seconds and its peak memory in GB."""
    start = time.perf_counter()
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:]\ntry:\n"
    code += " runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\nfinally:\n"
    code += " kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += " print('peak', kib, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(argv)}: {done.stderr[-2000:]}")
    return seconds, int(done.stderr.split("peak ")[-1]) * resource_unit() / 1e9


def resource_unit() -> int:
    """Return the unit of ru_maxrss in bytes."""
    return 1 if sys.platform == "darwin" else 1024


def main() -> None:
    """Make the checkpoint and measure each command on it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a key of tests/data/configs.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, made = Path(place) / "source", Path(place) / "converted"
        process = subprocess.run(  # so that its memory is given back
            [
                sys.executable,
                "-c",
                f"from {__spec__.name} import *; make({args.name!r}, Path({str(folder)!r}))",
            ],
            check=True,
        )
        assert process.returncode == 0
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{args.name}: {size / 1e9:.2f} GB of weights, {mx.default_device()}", flush=True)
        (Path(place) / "a.txt").write_text("the quick brown fox runs away . " * 400)
        commands = {
            "convert --scaling clex": (
                *("mlx_clex.convert", "--hf-path", str(folder), "--mlx-path", str(made)),
                *("--scaling", "clex"),
            ),
            "doctor": ("mlx_clex.doctor", str(made)),
            "generate, 8 tokens": (
                *("mlx_clex.generate", "--model", str(made), "--prompt", "hello"),
                *("--max-tokens", "8"),
            ),
            "lora, 2 steps of 128 tokens": (
                *("mlx_clex.lora", "--train", "--model", str(made), "--data", place),
                *("--iters", "2", "--batch-size", "1", "--max-seq-length", "128"),
                *("--val-batches", "0", "--adapter-path", str(Path(place) / "adapters")),
            ),
        }
        for label, argv in commands.items():
            seconds, peak = measured(*argv)
            print(f"| {label} | {seconds:.0f} s | {peak:.1f} GB |", flush=True)


if __name__ == "__main__":
    main()
