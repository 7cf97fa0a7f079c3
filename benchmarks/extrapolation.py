"""Compare how the methods extrapolate: perplexity by length after the same training.

    python -m benchmarks.extrapolation [--rope-theta 27] [--only NAME ...] [--output FOLDER]

Each run fine-tunes all weights of one small base with `mlx_clex.lora` for the same number of steps
and tokens, in sequences of 4 x L0, the trained length. Perplexity is measured on the same tokens of
held-out books with 1 to 32 x L0 of context: the last L0 of each window (`mlx_clex.perplexity
--protocol same-targets`). There are three seeds of each method.

The base has one of two geometries. With rope_theta 10,000 it is the bundled base, with 25 % of its
pairs finishing a turn within L0. With 27, where 70 % do as in Llama-2, it is trained first.
`--full` trains larger bases for each seed, which needs a GPU. An interrupted run continues, and
finished runs are not repeated.

Not covered: models above four million parameters, other texts, retrieval.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_clex  # noqa: F401  (before mlx.core: on Linux it looks for OpenBLAS)

# isort: split

from benchmarks.bundled_models import TRAINED_LENGTH, write_data, write_random
from mlx_clex.errors import RunError
from mlx_clex.evaluation.results import Results, read_results
from mlx_clex.pictures.draw import picture

TARGET = 32  # x L0: the reach of every method
ROW = 4 * TRAINED_LENGTH  # tokens of a training sequence
MULTIPLES = (1, 2, 4, 8, 16, 32)  # x L0: the measured lengths
LENGTHS = [multiple * TRAINED_LENGTH for multiple in MULTIPLES]
WINDOWS = 48  # of the held-out books, each with L0 scored tokens
SEEDS = (0, 1, 2)
BUNDLED_THETA = 10_000.0


@dataclass(frozen=True)
class Size:
    """The base model and the amount of training."""

    base_steps: int  # of twice the tokens
    steps: int
    tokens: int  # in a step
    learning_rate: float
    architecture: dict[str, float]
    bases: int  # trained for as many seeds; the other seeds start from the first


SMALL = Size(1500, 400, 1024, 1e-3, {}, bases=1)
FULL = Size(
    20_000,
    10_000,
    16_384,
    5e-4,
    {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512,
     "num_attention_heads": 4, "num_key_value_heads": 4},
    bases=3,
)  # fmt: skip

_SKIPS = ["--sampling", "skips"]
_CLEX = ["--scaling", "clex", "--max-factor", str(TARGET)]
_GENE = ["--scaling", "gene", "--factor", str(TARGET)]
_GENE_PARAM = ["--scaling", "gene-param", "--factor", str(TARGET)]
# Options of mlx_clex.lora. Methods with a fixed scale are trained at that scale; dynamic is
# trained at the scale of the training length, with the factor that equals untrained CLEX.
METHODS = {
    "none": ["--scaling", "none"],
    "clex": [*_CLEX, *_SKIPS],
    "gene": [*_GENE, "--release-recipe"],
    "yarn": ["--scaling", "yarn", "--factor", str(TARGET)],
    "yarn-t": ["--scaling", "yarn-t", "--factor", str(TARGET)],
    "linear": ["--scaling", "linear", "--factor", str(TARGET)],
    "ntk": ["--scaling", "ntk", "--factor", str(TARGET)],
    "dynamic": ["--scaling", "dynamic", "--factor", "2"],
    "gene-param": [*_GENE_PARAM, "--release-recipe"],
    "gene, skips": [*_GENE, *_SKIPS],
    "gene-param, skips": [*_GENE_PARAM, *_SKIPS],
    "clex, network trained": [*_CLEX, *_SKIPS, "--scaling-learning-rate", "1e-5"],
    "clex, no plain steps": [*_CLEX, *_SKIPS, "--plain-share", "0"],
    "clex, half plain steps": [*_CLEX, *_SKIPS, "--plain-share", "0.5"],
    "clex, reach of 64 x": ["--scaling", "clex", "--max-factor", str(2 * TARGET), *_SKIPS],
    "clex, two-stage": [*_CLEX, "--recipe", "two-stage"],
}
FIELD = ("none", "clex", "gene", "yarn", "yarn-t")  # compared without --only


@dataclass(frozen=True)
class Run:
    """One fine-tune."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return f"{self.method.replace(', ', '-').replace(' ', '-')}_{self.seed}"


def make_base(size: Size, theta: float, seed: int, folder: Path) -> Path:
    """Return the model that all runs of a seed start from; make it if it is missing."""
    if not (folder / "data" / "valid.jsonl").exists():
        write_data(folder / "data", digits=1)
    base = folder / "base" / f"{seed}"
    if base.exists():
        return base
    if theta == BUNDLED_THETA and size is not FULL:
        _command("convert", "--hf-path", "bundled:base", "--mlx-path", base, "--dtype", "float32")
        return base
    start, adapters = base.with_name(f"start_{seed}"), base.with_name(f"{seed}-run")
    if not (start / "config.json").exists():
        write_random(start, folder / "data", seed=seed, rope_theta=theta, **size.architecture)
    _lora(
        start, adapters, folder / "data", seed, TRAINED_LENGTH, METHODS["none"],
        steps=size.base_steps, tokens=2 * size.tokens, learning_rate=3e-3,
    )  # fmt: skip
    _command("fuse", "--model", start, "--adapter-path", adapters, "--save-path", base)
    return base


def train_and_measure(run: Run, size: Size, folder: Path, base: Path) -> None:
    """Train and measure a run, as far as that is not done; its results are in its folder."""
    adapters = folder / run.name
    if not (adapters / "trained").exists():
        _lora(
            base, adapters, folder / "data", run.seed, ROW, METHODS[run.method],
            steps=size.steps, tokens=size.tokens, learning_rate=size.learning_rate,
        )  # fmt: skip
        (adapters / "trained").touch()
    model = ("--model", base, "--adapter-path", adapters)
    _command(
        "perplexity",
        *(*model, "--lengths", *LENGTHS, "--data", folder / "data", "--split", "valid"),
        *("--windows", WINDOWS, "--output", adapters / "perplexity"),
    )
    rows = read_results(adapters / "perplexity").rows
    curve = " ".join(f"{row['perplexity']:.2f}" for row in rows)
    print(f"{run.name}: {curve}", flush=True)


def _lora(
    base: Path,
    adapters: Path,
    data: Path,
    seed: int,
    row: int,
    options: Sequence[str],
    *,
    steps: int,
    tokens: int,
    learning_rate: float,
) -> None:
    """Run `mlx_clex.lora` and resume an interrupted run."""
    _command(
        "lora",
        *("--train", "--resume", "--model", base, "--data", data),
        *("--adapter-path", adapters, "--fine-tune-type", "full", "--train-norms-and-embeddings"),
        *("--num-layers", "-1", "--max-seq-length", row),
        *("--batch-size", tokens // row, "--iters", steps),
        *("--learning-rate", learning_rate, "--optimizer", "adamw", "--cosine"),
        *("--warmup", steps // 20, "--max-grad-norm", 1, "--seed", seed),
        *("--steps-per-report", steps // 20, "--steps-per-eval", steps, "--save-every", 100),
        *("--val-batches", 8, *options),
    )  # fmt: skip


def _command(name: str, *arguments: Any) -> None:
    line = [sys.executable, "-m", f"mlx_clex.{name}", *(str(argument) for argument in arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(line[1:])} ended with {done.returncode}: {done.stderr[-2000:]}")


def print_tables(runs: Sequence[Run], folder: Path) -> None:
    """Print perplexity and its ratio to L0: mean and standard deviation over seeds."""
    folders: dict[str, list[Path]] = {}
    for run in runs:
        if (folder / run.name / "perplexity.json").exists():
            folders.setdefault(run.method, []).append(folder / run.name)
    results = {
        method: [read_results(path / "perplexity") for path in paths]
        for method, paths in folders.items()
    }
    columns = {
        "perplexity": {method: _columns(each, "perplexity") for method, each in results.items()},
        "perplexity / that at 1x": {
            method: _columns(each, "ratio") for method, each in results.items()
        },
    }
    for name, methods in columns.items():
        print(f"\n| {name} | {' | '.join(f'{multiple}x' for multiple in MULTIPLES)} |")
        print("|---" * (len(MULTIPLES) + 1) + "|")
        for method, cells in methods.items():
            digits = 3 if "/" in name else 2
            print(f"| {method} | {' | '.join(_with_spread(cell, digits) for cell in cells)} |")
    _draw(columns["perplexity"], folder)


def _columns(results: Sequence[Results], column: str) -> list[list[float]]:
    """Return a column at each length, of all seeds that are measured there."""
    found = [[result.find(length=length) for result in results] for length in LENGTHS]
    return [[row[column] for row in rows if row is not None] for rows in found]


def _with_spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _draw(perplexity: dict[str, list[list[float]]], folder: Path) -> None:
    """Draw perplexity against length, the mean over seeds."""
    rows = [
        {
            "text": "held-out books",
            "label": method,
            "trained_length": TRAINED_LENGTH,
            "reach": None,
            "length": length,
            "perplexity": statistics.mean(values),
            "low": None,
            "high": None,
        }
        for method, columns in perplexity.items()
        for length, values in zip(LENGTHS, columns, strict=True)
        if values
    ]
    results = Results("perplexity", {"protocol": "same-targets"}, ("label", "length"), rows)
    results.prefix = folder / "extrapolation"
    results.write()
    picture(results)


def main() -> None:
    """Run what is missing, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--rope-theta", type=float, default=BUNDLED_THETA, help="Of the base. Default: 10000."
    )
    parser.add_argument("--full", action="store_true", help="Larger bases, for a GPU.")
    parser.add_argument(
        "--output", type=Path, help="Default: build/extrapolation-THETA, or -THETA-full."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time. Default: 1.")
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", choices=METHODS, help="Only runs of these methods."
    )
    parser.add_argument("--seed", type=int, choices=SEEDS, help="Only runs with this seed.")
    parser.add_argument(
        "--table", action="store_true", help="Print finished runs; train and measure nothing."
    )
    args = parser.parse_args()
    size = FULL if args.full else SMALL
    name = f"extrapolation-{args.rope_theta:g}{'-full' if args.full else ''}"
    folder = args.output or Path("build") / name
    runs = [
        Run(method, seed)
        for seed in SEEDS
        for method in args.only or FIELD
        if args.seed in (None, seed)
    ]
    if not args.table:
        needed = {min(run.seed, size.bases - 1) for run in runs}
        bases = {seed: make_base(size, args.rope_theta, seed, folder) for seed in sorted(needed)}
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = {
                run.name: pool.submit(
                    train_and_measure, run, size, folder, bases[min(run.seed, size.bases - 1)]
                )
                for run in runs
            }
            for name, future in futures.items():
                try:
                    future.result()
                except RunError as error:  # a diverged run must not stop the others
                    print(f"{name}: {error}", file=sys.stderr)
    print_tables(runs, folder)


if __name__ == "__main__":
    main()
