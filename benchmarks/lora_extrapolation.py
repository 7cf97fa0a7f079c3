"""Compare how the methods extrapolate after LoRA of a published model: perplexity by length.

    python examples/fetch_smollm2.py build/smollm2
    python -m benchmarks.lora_extrapolation [--only NAME ...]

The trained length of SmolLM2-135M is taken as 2,048 tokens; its config says 8,192. Its adapters are
trained with each method, set up for 4 x 2,048 tokens, in sequences of 512 tokens. Then the last
2,048 tokens of windows of held-out books are scored with 1, 2 and 4 x 2,048 tokens of context
(`mlx_clex.perplexity --protocol same-targets`). An interrupted run continues, and finished runs are
not repeated.

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
TRAINED_LENGTH = 2048
REACH = 4  # x TRAINED_LENGTH
LENGTHS = (TRAINED_LENGTH, 2 * TRAINED_LENGTH, REACH * TRAINED_LENGTH)

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
_CLEX = {"scaling": "clex", "max_factor": REACH}
METHODS: dict[str, dict[str, Any]] = {
    "none": {"scaling": "none"},
    "clex": _CLEX,
    "clex, log gain": _CLEX | {"log_gain": True},
    "gene": {"scaling": "gene", "factor": REACH, "release_recipe": True},
    "yarn": {"scaling": "yarn", "factor": REACH},
    "yarn-t": {"scaling": "yarn-t", "factor": REACH},
}


def train_and_measure(name: str, base: Path, windows: int, folder: Path) -> None:
    """Train a method's adapters and measure them, as far as that is not done."""
    books, adapters = folder / "books", _adapters(name, folder)
    if not (adapters / "trained").exists():
        train(base, books, adapters, TRAINING | METHODS[name])
        (adapters / "trained").touch()
    model = ("--model", base, "--adapter-path", adapters, "--data", books, "--split", "valid")
    lengths = ("--lengths", *LENGTHS, "--windows", windows)
    command("perplexity", *model, *lengths, "--output", adapters / "perplexity")


def print_table(names: Iterable[str], folder: Path) -> None:
    """Print the perplexity of each measured method, and its ratio to that at the first length.

    From five windows on a ratio has a 95 % interval.
    """
    print(f"\n| method | {' | '.join(f'{length:,}' for length in LENGTHS)} |")
    print("|---" * (len(LENGTHS) + 1) + "|")
    for name in names:
        path = _adapters(name, folder) / "perplexity"
        rows = read_results(path).rows if path.with_suffix(".json").exists() else []
        if len(rows) == len(LENGTHS):
            print(f"| {name} | {' | '.join(_cell(row) for row in rows)} |")


def _cell(row: dict[str, Any]) -> str:
    text = f"{row['perplexity']:.2f}; {row['ratio']:.3f}"
    if row["ratio_low"] is None:
        return text
    return f"{text} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"


def _adapters(name: str, folder: Path) -> Path:
    return folder / file_name(name)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODEL, help=f"Default: {MODEL}.")
    parser.add_argument(
        "--output", type=Path, default=Path("build/lora-extrapolation"), help="Default: %(default)s"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", choices=METHODS, default=list(METHODS),
        help="Only these methods. Default: all.",
    )  # fmt: skip
    parser.add_argument("--windows", type=int, default=2, help="Default: 2.")
    parser.add_argument(
        "--table", action="store_true", help="Print finished runs; train and measure nothing."
    )
    args = parser.parse_args()
    base = args.output / "base"
    if not args.table:
        write_books(args.output / "books")
        if not base.exists():
            length = ("--trained-length", TRAINED_LENGTH, "--dtype", "float32")
            command("convert", "--hf-path", args.model, "--mlx-path", base, *length)
        for name in args.only:
            try:
                train_and_measure(name, base, args.windows, args.output)
            except RunError as error:  # a diverged run must not stop the others
                print(f"{name}: {error}", file=sys.stderr)
    print_table(args.only, args.output)


if __name__ == "__main__":
    main()
