"""Compare how the methods extrapolate: perplexity and recall by length after the same training.

    python -m benchmarks.extrapolation [--rope-theta 27] [--longer-rows] [--only NAME ...]

Each run fine-tunes all weights of one small base with `mlx_clex.lora` for the same number of steps
and tokens, in sequences of 4 x L0, the trained length. With `--longer-rows` it goes on in sequences
of 16 x L0, for a quarter more steps. Both stages are measured with 1 to 32 x L0 of context: the
perplexity of the same tokens of held-out books, the last L0 of each window (`mlx_clex.perplexity
--protocol same-targets`), and the recall of a key that is stated once among verses of these books
(`mlx_clex.passkey --task words`). There are three seeds of each method.

The base has one of two geometries. With rope_theta 10,000 it is the bundled base, with 25 % of its
pairs finishing a turn within L0. With 27, where 70 % do as in Llama-2, it is trained first. Both
are then taught to recall over a few words, as the bundled models are. `--full` trains larger bases
for each seed, which needs a GPU. An interrupted run continues, and finished runs are not repeated.

Not covered: models above four million parameters, other texts.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_clex  # noqa: F401  (before mlx.core: on Linux it looks for OpenBLAS)

# isort: split

from benchmarks.bundled_models import (
    BASE,
    LESSONS,
    TRAINED_LENGTH,
    TRAINING,
    command,
    train,
    train_and_fuse,
    write_data,
    write_lessons,
    write_random,
)
from mlx_clex.errors import RunError
from mlx_clex.evaluation.results import Results, read_results
from mlx_clex.pictures.draw import picture

TARGET = 32  # x L0: the reach of every method
MULTIPLES = (1, 2, 4, 8, 16, 32)  # x L0: the measured lengths
LENGTHS = [multiple * TRAINED_LENGTH for multiple in MULTIPLES]
WINDOWS = 48  # of the held-out books, each with L0 scored tokens
SEEDS = (0, 1, 2)
BUNDLED_THETA = 10_000.0
MEASURED = "measured"  # name of an empty file beside results that are complete


@dataclass(frozen=True)
class Stage:
    """A part of the training of a run, measured at its end."""

    multiple: int  # x L0: tokens of a training sequence
    share: float  # of the steps of the first stage
    pace: float  # of the learning rate of the first stage
    most_verses: int  # of the training texts with a key

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"rows-{self.multiple}x"


USUAL = Stage(4, 1, 1, 16)
LONGER = Stage(16, 0.25, 0.5, 48)


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

_CLEX = {"scaling": "clex", "max_factor": TARGET, "sampling": "skips"}
_CREAM = _CLEX | {"sampling": "cream"}
_GENE = {"scaling": "gene", "factor": TARGET}
_GENE_PARAM = {"scaling": "gene-param", "factor": TARGET}
_YARN_T = {"scaling": "yarn-t", "factor": TARGET}
_RELEASED = {"release_recipe": True}
# Options of mlx_clex.lora. Methods with a fixed scale are trained at that scale; dynamic is
# trained at the scale of the training length, with the factor that equals untrained CLEX.
METHODS: dict[str, dict[str, Any]] = {
    "none": {"scaling": "none"},
    "clex": _CLEX,
    "clex, log gain": _CLEX | {"log_gain": True},
    "gene": _GENE | _RELEASED,
    "yarn": {"scaling": "yarn", "factor": TARGET},
    "yarn-t": _YARN_T | {"sampling": "skips"},
    "linear": {"scaling": "linear", "factor": TARGET},
    "ntk": {"scaling": "ntk", "factor": TARGET},
    "dynamic": {"scaling": "dynamic", "factor": 2},
    "gene-param": _GENE_PARAM | _RELEASED,
    "gene, skips": _GENE | {"sampling": "skips"},
    "gene-param, skips": _GENE_PARAM | {"sampling": "skips"},
    "clex, cream": _CREAM,
    "clex, log gain, cream": _CREAM | {"log_gain": True},
    "yarn-t, cream": _YARN_T | {"sampling": "cream"},
    "clex, network trained": _CLEX | {"scaling_learning_rate": 1e-5},
    "clex, no plain steps": _CLEX | {"plain_share": 0},
    "clex, half plain steps": _CLEX | {"plain_share": 0.5},
    "clex, reach of 64 x": _CLEX | {"max_factor": 2 * TARGET},
    "clex, cream, two-stage": _CREAM | {"recipe": "two-stage"},
    "clex, log gain, cream, two-stage": _CREAM | {"log_gain": True, "recipe": "two-stage"},
}
# Compared without --only.
FIELD = ("none", "clex", "clex, log gain", "clex, log gain, cream", "gene", "yarn", "yarn-t")


Cell = Callable[[list[dict[str, Any]]], float]  # a figure from the rows of one length


@dataclass(frozen=True)
class Run:
    """One fine-tune."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return f"{file_name(self.method)}_{self.seed}"


def file_name(method: str) -> str:
    """Return the name of a method in those of files."""
    return method.replace(", ", "-").replace(" ", "-")


def make_base(size: Size, theta: float, seed: int, folder: Path) -> Path:
    """Return the model that all runs of a seed start from; make what is missing of it."""
    lessons, start = folder / "lessons", folder / "base" / f"start_{seed}"
    if not (lessons / "train.jsonl").exists():
        write_lessons(lessons)
    base = start.with_name(f"base_{seed}")
    if theta == BUNDLED_THETA and size is not FULL:
        if not base.exists():
            command(
                "convert", "--hf-path", "bundled:base", "--mlx-path", base, "--dtype", "float32"
            )
    else:
        data = make_data(USUAL, folder)
        if not (start / "config.json").exists():
            write_random(start, data, seed=seed, rope_theta=theta, **size.architecture)
        settings = BASE | {
            "iters": size.base_steps,
            "batch_size": 2 * size.tokens // TRAINED_LENGTH,
            "learning_rate": 3e-3,
            "seed": seed,
        }
        train_and_fuse(start, data, base, settings)
    return train_and_fuse(base, lessons, start.with_name(f"taught_{seed}"), LESSONS)


def make_data(stage: Stage, folder: Path) -> Path:
    """Return the folder of a stage's texts; write it if it is missing."""
    data = folder / f"texts-{stage.name}"
    if not (data / "valid.jsonl").exists():
        write_data(data, digits=1, most_verses=stage.most_verses)
    return data


def train_and_measure(
    run: Run, size: Size, stages: Sequence[Stage], folder: Path, base: Path
) -> None:
    """Train and measure a run, as far as that is not done; its results are in its folder."""
    before: Path | None = None
    for stage in stages:
        adapters = folder / run.name / stage.name
        row, steps = stage.multiple * TRAINED_LENGTH, round(stage.share * size.steps)
        if not (adapters / "trained").exists():
            settings: dict[str, Any] = {
                "iters": steps,
                "learning_rate": stage.pace * size.learning_rate,
                "max_seq_length": row,
                "batch_size": size.tokens // row,
                "warmup": steps // 20,
                "steps_per_eval": steps,
                "save_every": 100,
                "seed": run.seed,
            }
            if before:
                settings["resume_adapter_file"] = str(before)
            data = make_data(stage, folder)
            train(base, data, adapters, TRAINING | settings | METHODS[run.method])
            (adapters / "trained").touch()
        before = adapters
        model = ("--model", base, "--adapter-path", adapters, "--lengths", *LENGTHS)
        books = ("--data", make_data(USUAL, folder), "--split", "valid", "--windows", WINDOWS)
        command("perplexity", *model, *books, "--output", adapters / "perplexity")
        command("passkey", *model, "--task", "words", "--output", adapters / "passkey")
        (adapters / MEASURED).touch()


def print_tables(runs: Sequence[Run], stage: Stage, folder: Path) -> None:
    """Print perplexity, its ratio to L0 and recall: mean and standard deviation over seeds."""
    measured = _measured(runs, stage, folder, "perplexity")
    if not measured:
        print(f"\nNone of these runs is finished in {folder}, in rows of {stage.multiple} x L0.")
        return
    print(f"\nAfter training in rows of {stage.multiple} x L0:")
    tables: list[tuple[str, str, int, Cell]] = [
        ("perplexity", "perplexity", 2, lambda rows: rows[0]["perplexity"]),
        ("perplexity / that at 1x", "perplexity", 3, lambda rows: rows[0]["ratio"]),
        ("recall", "passkey", 2, _recall),
    ]
    for title, kind, digits, cell in tables:
        print(f"\n| {title} | {' | '.join(f'{multiple}x' for multiple in MULTIPLES)} |")
        print("|---" * (len(MULTIPLES) + 1) + "|")
        for method, results in _measured(runs, stage, folder, kind).items():
            cells = [_with_spread(_column(results, length, cell), digits) for length in LENGTHS]
            print(f"| {method} | {' | '.join(cells)} |")
    _draw(measured, folder / f"extrapolation-{stage.name}")


def _recall(rows: list[dict[str, Any]]) -> float:
    return sum(row["correct"] for row in rows) / sum(row["trials"] for row in rows)


def _measured(
    runs: Sequence[Run], stage: Stage, folder: Path, kind: str
) -> dict[str, list[Results]]:
    """Return the complete results of all seeds by method."""
    found: dict[str, list[Results]] = {}
    for run in runs:
        adapters = folder / run.name / stage.name
        if (adapters / MEASURED).exists():
            found.setdefault(run.method, []).append(read_results(adapters / kind))
    return found


def _column(results: Sequence[Results], length: int, cell: Cell) -> list[float]:
    """Return a figure at a length, of all seeds."""
    return [cell([row for row in each.rows if row["length"] == length]) for each in results]


def _with_spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _draw(measured: dict[str, list[Results]], path: Path) -> None:
    """Draw perplexity against length, the mean over seeds."""
    rows = [
        {
            "text": "held-out books",
            "label": method,
            "trained_length": TRAINED_LENGTH,
            "reach": None,
            "length": length,
            "perplexity": statistics.mean(
                _column(results, length, lambda rows: rows[0]["perplexity"])
            ),
            "low": None,
            "high": None,
        }
        for method, results in measured.items()
        for length in LENGTHS
    ]
    results = Results("perplexity", {"protocol": "same-targets"}, ("label", "length"), rows)
    results.prefix = path
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
        "--longer-rows",
        action="store_true",
        help="Go on in sequences of 16 x L0 and measure again.",
    )
    parser.add_argument(
        "--output", type=Path, help="Default: build/extrapolation-THETA, or -THETA-full."
    )
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", choices=METHODS, help="Only runs of these methods."
    )
    parser.add_argument("--seed", type=int, choices=SEEDS, help="Only runs with this seed.")
    parser.add_argument(
        "--learning-rate", type=float, help="In rows of 4 x L0. Each needs an --output of its own."
    )
    parser.add_argument(
        "--table", action="store_true", help="Print finished runs; train and measure nothing."
    )
    args = parser.parse_args()
    size = FULL if args.full else SMALL
    name = f"extrapolation-{args.rope_theta:g}{'-full' if args.full else ''}"
    folder = args.output or Path("build") / name
    usual = USUAL
    if args.learning_rate:
        usual = replace(USUAL, pace=args.learning_rate / size.learning_rate)
    stages = [usual, LONGER] if args.longer_rows else [usual]
    runs = [
        Run(method, seed)
        for seed in SEEDS
        for method in args.only or FIELD
        if args.seed in (None, seed)
    ]
    for run in [] if args.table else runs:
        base = make_base(size, args.rope_theta, min(run.seed, size.bases - 1), folder)
        try:
            train_and_measure(run, size, stages, folder, base)
        except RunError as error:  # a diverged run must not stop the others
            print(f"{run.name}: {error}", file=sys.stderr)
    for stage in stages:
        print_tables(runs, stage, folder)


if __name__ == "__main__":
    main()
