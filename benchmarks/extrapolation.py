"""Compare how the methods extrapolate: perplexity by length after the same training.

    python -m benchmarks.extrapolation --quick [--only NAME ...] [--output FOLDER]
    python -m benchmarks.extrapolation --geometry

Each run fine-tunes all weights of a small base with `mlx_clex.lora`, at the trained length L0
or at 4 x L0, with the same number of steps and tokens. Perplexity is measured on the same tokens
of held-out books with 1 to 32 x L0 of context: the last L0 of each window (`mlx_clex.perplexity
--protocol same-targets`). The table has the perplexity at L0, and that at other lengths divided
by it. `--quick` starts from the bundled base. `--geometry` trains a base of the same size first,
whose pairs turn as often within L0 as those of larger models (rope_theta 27). Without either, a
larger base is trained for each of three seeds, which needs a GPU. An interrupted run continues, and
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
MULTIPLES = (1, 2, 4, 8, 16, 32)  # x L0: the measured lengths
WINDOWS = 24  # of the held-out books, each with L0 scored tokens


@dataclass(frozen=True)
class Size:
    """The base model and the amount of training."""

    seeds: int
    steps: int
    tokens: int  # in a step
    base_steps: int  # steps of training the base; 0 takes the bundled base
    learning_rate: float
    architecture: dict[str, float]
    bases: int = 1  # trained for as many seeds; the other seeds start from the first


QUICK = Size(1, 2000, 512, 0, 5e-4, {})
GEOMETRY = Size(3, 300, 1024, 1500, 1e-3, {"rope_theta": 27.0})
FULL = Size(
    3,
    10_000,
    16_384,
    20_000,
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
    "linear": ["--scaling", "linear", "--factor", str(TARGET)],
    "ntk": ["--scaling", "ntk", "--factor", str(TARGET)],
    "dynamic": ["--scaling", "dynamic", "--factor", "2"],
    "yarn": ["--scaling", "yarn", "--factor", str(TARGET)],
    "yarn-t": ["--scaling", "yarn-t", "--factor", str(TARGET)],
    "gene": [*_GENE, "--release-recipe"],
    "gene-param": [*_GENE_PARAM, "--release-recipe"],
    "clex": [*_CLEX, "--release-recipe"],
    "gene, skips": [*_GENE, *_SKIPS],
    "gene-param, skips": [*_GENE_PARAM, *_SKIPS],
    "clex, skips": [*_CLEX, *_SKIPS],
}


def _network(share: float) -> list[str]:
    """Return options that train CLEX's network at a share of the model's learning rate."""
    return ["--scaling-learning-rate", f"{share * QUICK.learning_rate:g}"]


_FAR = ["--scaling", "clex", "--max-factor", str(2 * TARGET)]
_NO_PLAIN = ["--plain-share", "0"]
# Variants of CLEX's training, at four times the trained length and with --quick only.
TRIED = {
    "clex, skips, no plain steps": [*_CLEX, *_SKIPS, *_NO_PLAIN],
    "clex, skips, reach of 64 x": [*_FAR, *_SKIPS],
    "clex, skips, reach of 64 x, no plain steps": [*_FAR, *_SKIPS, *_NO_PLAIN],
    "clex, skips, network 0.01 x": [*_CLEX, *_SKIPS, *_network(0.01)],
    "clex, skips, network 0.1 x": [*_CLEX, *_SKIPS, *_network(0.1)],
    "clex, release, network 0.01 x": [*_CLEX, "--release-recipe", *_network(0.01)],
}
# Variants that --quick repeats with two more seeds.
BEST = ("clex, skips", "clex, skips, no plain steps", "clex, skips, reach of 64 x")
# Methods that --geometry compares, at four times the trained length.
FIELD = ("none", "clex, skips", "gene", "yarn", "yarn-t")


@dataclass(frozen=True)
class Run:
    """One fine-tune."""

    method: str
    options: tuple[str, ...]  # options of mlx_clex.lora
    length: int  # length of the training sequences, tokens
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        method = self.method.replace(", ", "-").replace(" ", "")
        return f"{method}_{self.length}_{self.seed}"


def all_runs(size: Size) -> list[Run]:
    """Return all runs, the main comparison first."""
    seeds = range(size.seeds)
    field = size is GEOMETRY
    lengths = (4 * TRAINED_LENGTH,) if field else (TRAINED_LENGTH, 4 * TRAINED_LENGTH)
    runs = [
        Run(method, tuple(METHODS[method]), length, seed)
        for length in lengths
        for seed in seeds
        for method in (FIELD if field else METHODS)
    ]
    if size is QUICK:
        runs += [
            Run(method, tuple(options), 4 * TRAINED_LENGTH, 0) for method, options in TRIED.items()
        ]
        runs += [
            Run(method, tuple({**METHODS, **TRIED}[method]), 4 * TRAINED_LENGTH, seed)
            for method in BEST
            for seed in (1, 2)
        ]
    return runs


def make_base(size: Size, seed: int, folder: Path) -> str:
    """Return the model that all runs of a seed start from; train it if it is missing."""
    if not size.base_steps:
        return "bundled:base"
    start, adapters, base = folder / f"start_{seed}", folder / f"train_{seed}", folder / f"{seed}"
    if base.exists():
        return str(base)
    if not (start / "config.json").exists():
        write_random(start, folder.parent / "data", seed=seed, **size.architecture)
    run = Run("none", tuple(METHODS["none"]), TRAINED_LENGTH, seed)
    _lora(start, adapters, run, size, steps=size.base_steps, learning_rate=3e-3, data=folder.parent)
    _command("fuse", "--model", start, "--adapter-path", adapters, "--save-path", base)
    return str(base)


def train_and_measure(run: Run, size: Size, folder: Path, base: str) -> None:
    """Train and measure a run, as far as that is not done; its results are in its folder."""
    adapters = folder / run.name
    if (adapters / "perplexity.json").exists() and len(
        read_results(adapters / "perplexity").rows
    ) == len(MULTIPLES):
        return
    _lora(base, adapters, run, size, size.steps, size.learning_rate, folder)
    _command(
        "perplexity",
        *("--model", base, "--adapter-path", adapters, "--data", folder / "data"),
        *("--split", "valid", "--lengths", *(multiple * TRAINED_LENGTH for multiple in MULTIPLES)),
        *("--windows", WINDOWS, "--output", adapters / "perplexity"),
    )
    print(f"{run.name}: {_curve(read_results(adapters / 'perplexity'))}", flush=True)


def _lora(
    base: str | Path,
    adapters: Path,
    run: Run,
    size: Size,
    steps: int,
    learning_rate: float,
    data: Path,
) -> None:
    """Run `mlx_clex.lora` and resume an interrupted run."""
    _command(
        "lora",
        *("--train", "--resume", "--model", base, "--data", data / "data"),
        *("--adapter-path", adapters, "--fine-tune-type", "full", "--train-norms-and-embeddings"),
        *("--num-layers", "-1", "--max-seq-length", run.length),
        *("--batch-size", size.tokens // run.length, "--iters", steps),
        *("--learning-rate", learning_rate, "--optimizer", "adamw", "--cosine"),
        *("--warmup", steps // 20, "--max-grad-norm", 1, "--seed", run.seed),
        *("--steps-per-report", steps // 20, "--steps-per-eval", steps, "--save-every", 500),
        *("--val-batches", 8, *run.options),
    )  # fmt: skip


def _command(name: str, *arguments: Any) -> None:
    _python(["-m", f"mlx_clex.{name}", *(str(argument) for argument in arguments)])


def _python(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")


def summary(runs: Sequence[Run], folder: Path) -> dict[tuple[str, int], list[Results]]:
    """Return the results by method and training length, one entry for each seed."""
    found: dict[tuple[str, int], list[Results]] = {}
    for run in runs:
        file = folder / run.name / "perplexity.json"
        if file.exists():
            found.setdefault((run.method, run.length), []).append(read_results(file))
    return found


def print_table(found: dict[tuple[str, int], list[Results]]) -> None:
    """Print the perplexity at L0 and ratios to it, with the standard deviation over seeds."""
    ratios = " | ".join(f"{multiple}x" for multiple in MULTIPLES[1:])
    print(f"| method | trained at | {MULTIPLES[0]}x, perplexity | {ratios} |")
    print("|---" * (len(MULTIPLES) + 2) + "|")
    for (method, length), results in found.items():
        cells = [_with_spread(_values(results, TRAINED_LENGTH, "perplexity"), 2)]
        cells += [
            _with_spread(_values(results, m * TRAINED_LENGTH, "ratio"), 3) for m in MULTIPLES[1:]
        ]
        seeds = f" ({len(results)} seeds)" if len(results) > 1 else ""
        print(f"| {method}{seeds} | {length // TRAINED_LENGTH} x L0 | {' | '.join(cells)} |")


def _with_spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _values(results: Sequence[Results], length: int, column: str) -> list[float]:
    """Return a column of all seeds that are measured at a length."""
    rows = (result.find(length=length) for result in results)
    return [row[column] for row in rows if row is not None]


def draw_pictures(found: dict[tuple[str, int], list[Results]], folder: Path) -> None:
    """Draw perplexity against length (mean over seeds), one picture for each training length."""
    for trained in sorted({length for _, length in found}):
        rows = [
            {
                "text": f"held-out books, models trained at {trained} tokens",
                "label": method,
                "trained_length": TRAINED_LENGTH,
                "reach": None,
                "length": multiple * TRAINED_LENGTH,
                "perplexity": statistics.mean(values),
                "low": None,
                "high": None,
            }
            for (method, length), results in found.items()
            if length == trained and method in METHODS
            for multiple in MULTIPLES
            if (values := _values(results, multiple * TRAINED_LENGTH, "perplexity"))
        ]
        settings = {"protocol": "same-targets", "trained at": trained}
        results = Results("perplexity", settings, ("label", "length"), rows)
        results.prefix = folder / f"trained-at-{trained}"
        results.write()
        picture(results)


def _curve(results: Results) -> str:
    return " ".join(f"{row['perplexity']:.2f}" for row in results.rows)


def main() -> None:
    """Run what is missing, print the table and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="0.9 M parameters, about an hour.")
    which.add_argument(
        "--geometry", action="store_true", help="0.9 M parameters, rope_theta 27, about an hour."
    )
    parser.add_argument(
        "--output", type=Path, help="Default: build/extrapolation-quick, -geometry or -full."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time. Default: 1.")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="Only runs of these methods.")
    parser.add_argument(
        "--at", type=int, metavar="TOKENS", help="Only runs trained at this length."
    )
    parser.add_argument("--seed", type=int, help="Only runs with this seed.")
    parser.add_argument(
        "--table", action="store_true", help="Print finished runs; train and measure nothing."
    )
    args = parser.parse_args()
    name = "quick" if args.quick else "geometry" if args.geometry else "full"
    size = {"quick": QUICK, "geometry": GEOMETRY, "full": FULL}[name]
    folder = args.output or Path("build") / f"extrapolation-{name}"
    runs = [
        run
        for run in all_runs(size)
        if run.method in (args.only or [run.method])
        and args.at in (None, run.length)
        and args.seed in (None, run.seed)
    ]
    if not args.table:
        if not (folder / "data" / "valid.jsonl").exists():
            write_data(folder / "data")
        bases = {seed: make_base(size, seed, folder / "base") for seed in range(size.bases)}
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = {
                run.name: pool.submit(
                    train_and_measure, run, size, folder, bases.get(run.seed, bases[0])
                )
                for run in runs
            }
            for name, future in futures.items():
                try:
                    future.result()
                except RunError as error:  # a diverged run must not stop the others
                    print(f"{name}: {error}", file=sys.stderr)
    found = summary(runs, folder)
    print_table(found)
    draw_pictures(found, folder)


if __name__ == "__main__":
    main()
