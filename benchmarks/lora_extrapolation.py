"""Compare how a published model reads beyond its trained length: untrained, and after LoRA.

    python examples/fetch_smollm2.py build/smollm2
    python -m benchmarks.lora_extrapolation [--only NAME ...]

SmolLM2-135M was trained on 8,192 tokens. The last 8,192 tokens of windows of held-out books are
scored with 8,192 and 16,384 tokens of context (`mlx_clex.perplexity --protocol same-targets`): by
the model as it is, with a scaling switched on, and after LoRA with each method in sequences of 512
tokens, whose positions go up to 16,384. An interrupted run continues, and finished runs are not
repeated.

Not covered: longer sequences, recall, other models.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx_clex  # noqa: F401  (before mlx.core: on Linux it looks for OpenBLAS)

# isort: split

from benchmarks.bundled_models import command, train, write_books
from benchmarks.extrapolation import file_name
from mlx_clex.errors import RunError
from mlx_clex.evaluation.results import read_results

MODEL = Path("build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TRAINED_LENGTH = 8192
REACH = 2  # x TRAINED_LENGTH
LENGTHS = (TRAINED_LENGTH, REACH * TRAINED_LENGTH)
UNTRAINED = {f"untrained, {scaling}": scaling for scaling in ("none", "yarn-t")}

# Options of mlx_clex.lora; others have their defaults.
TRAINING = {
    "train": True,
    "iters": 80,
    "batch_size": 1,
    "max_seq_length": 512,
    "learning_rate": 3e-5,
    "warmup": 8,
    "max_grad_norm": 1.0,
    "val_batches": 1,
    "save_every": 20,
}
_SKIPS = {"sampling": "skips", "scale_draw": "uniform"}
_CLEX = {"scaling": "clex", "max_factor": REACH} | _SKIPS
METHODS: dict[str, dict[str, Any]] = {
    "none": {"scaling": "none"},
    "clex": _CLEX,
    "clex, log gain": _CLEX | {"log_gain": True},
    "clex, log gain, cream": _CLEX | {"log_gain": True, "sampling": "cream"},
    "gene": {"scaling": "gene", "factor": REACH} | _SKIPS,
    "yarn": {"scaling": "yarn", "factor": REACH, "sampling": "skips"},  # at one scale
    "yarn-t": {"scaling": "yarn-t", "factor": REACH} | _SKIPS,
}


def train_and_measure(name: str, base: Path, windows: int, folder: Path) -> None:
    """Train a method's adapters, if it has any, and measure, as far as that is not done."""
    own, books = _folder(name, folder), folder / "books"
    own.mkdir(parents=True, exist_ok=True)
    options: tuple[Any, ...] = ("--adapter-path", own)
    if name in UNTRAINED:
        options = ("--scalings", UNTRAINED[name])
    elif not (own / "trained").exists():
        train(base, books, own, TRAINING | METHODS[name])
        (own / "trained").touch()
    text = ("--data", books, "--split", "valid", "--lengths", *LENGTHS, "--windows", windows)
    command("perplexity", "--model", base, *options, *text, "--output", own / "perplexity")


def print_table(names: Iterable[str], folder: Path) -> None:
    """Print the perplexity of each measured method, and its ratio to that at the first length.

    From five windows on a ratio has a 95 % interval.
    """
    print(f"\n| | {' | '.join(f'{length:,}' for length in LENGTHS)} |")
    print("|---" * (len(LENGTHS) + 1) + "|")
    for name in names:
        path = _folder(name, folder) / "perplexity"
        rows = read_results(path).rows if path.with_suffix(".json").exists() else []
        if len(rows) == len(LENGTHS):
            print(f"| {name} | {' | '.join(_cell(row) for row in rows)} |")


def _cell(row: dict[str, Any]) -> str:
    text = f"{row['perplexity']:.2f}; {row['ratio']:.3f}"
    if row["ratio_low"] is None:
        return text
    return f"{text} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"


def _folder(name: str, folder: Path) -> Path:
    return folder / file_name(name)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODEL, help=f"Default: {MODEL}.")
    parser.add_argument(
        "--output", type=Path, default=Path("build/lora-extrapolation"), help="Default: %(default)s"
    )
    names = [*UNTRAINED, *METHODS]
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=names, default=names,
        help="Only these rows of the table. Default: all.",
    )  # fmt: skip
    parser.add_argument("--windows", type=int, default=1, help="Default: 1.")
    parser.add_argument(
        "--table", action="store_true", help="Print finished runs; train and measure nothing."
    )
    args = parser.parse_args()
    base = args.output / "base"
    if not args.table:
        write_books(args.output / "books")
        if not base.exists():
            command("convert", "--hf-path", args.model, "--mlx-path", base, "--dtype", "float32")
        for name in args.only:
            try:
                train_and_measure(name, base, args.windows, args.output)
            except RunError as error:  # a diverged run must not stop the others
                print(f"{name}: {error}", file=sys.stderr)
    print_table(args.only, args.output)


if __name__ == "__main__":
    main()
