"""How far each method reaches: perplexity by length after the same training.

    python -m benchmarks.extrapolation --quick [--only NAME ...] [--output FOLDER]

Every run fine-tunes all weights of one small base with `mlx_clex.lora`, at the trained length
L0 or at four times that, for the same number of steps and tokens, and is measured at 1 to
32 x L0 on the very same tokens of a held-out text, cut into windows of that length, each read
whole. `--quick` starts from the base that
comes with the package; the full form trains a larger one first, for each of three seeds, and
is for a GPU. A run that is interrupted goes on where it stopped; finished ones are not
repeated.

Not covered: anything above four million parameters, other texts, retrieval.
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
import numpy as np

from benchmarks.bundled_models import TRAINED_LENGTH, write_data, write_random
from mlx_clex.data.corpus import Corpus, load_corpora
from mlx_clex.errors import RunError
from mlx_clex.evaluation.perplexity import score, windows_of
from mlx_clex.evaluation.results import Results, open_results, read_results
from mlx_clex.loading import load
from mlx_clex.model.scaled_model import ScaledModel
from mlx_clex.pictures.draw import picture

TARGET = 32  # x L0: the length that every method is set up for
MULTIPLES = (1, 2, 4, 8, 16, 32)  # x L0, measured
MEASURED = 32_768  # tokens of the held-out text


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    seeds: int
    steps: int
    tokens: int  # a step
    base_steps: int  # 0: the base that comes with the package
    learning_rate: float
    architecture: dict[str, int]


QUICK = Size(1, 2000, 512, 0, 5e-4, {})
FULL = Size(
    3,
    10_000,
    16_384,
    20_000,
    5e-4,
    {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512,
     "num_attention_heads": 4, "num_key_value_heads": 4},
)  # fmt: skip

_SKIPS = ["--sampling", "skips"]
_CLEX = ["--scaling", "clex", "--max-factor", str(TARGET)]
_GENE = ["--scaling", "gene", "--factor", str(TARGET)]
_GENE_PARAM = ["--scaling", "gene-param", "--factor", str(TARGET)]
# What is asked of mlx_clex.lora. Static methods are trained at their one scale; dynamic, with
# the factor that makes it CLEX's own start, at that of the training length.
METHODS = {
    "none": ["--scaling", "none"],
    "linear": ["--scaling", "linear", "--factor", str(TARGET)],
    "ntk": ["--scaling", "ntk", "--factor", str(TARGET)],
    "dynamic": ["--scaling", "dynamic", "--factor", "2"],
    "yarn": ["--scaling", "yarn", "--factor", str(TARGET)],
    "gene": [*_GENE, "--release-recipe"],
    "gene-param": [*_GENE_PARAM, "--release-recipe"],
    "clex": [*_CLEX, "--release-recipe"],
    "gene, skips": [*_GENE, *_SKIPS],
    "gene-param, skips": [*_GENE_PARAM, *_SKIPS],
    "clex, skips": [*_CLEX, *_SKIPS],
}


def _network(share: float) -> list[str]:
    """CLEX's network at this share of the model's learning rate."""
    return ["--scaling-learning-rate", f"{share * QUICK.learning_rate:g}"]


_FAR = ["--scaling", "clex", "--max-factor", str(2 * TARGET)]
_NO_PLAIN = ["--plain-share", "0"]
# The search for what makes CLEX best, at four times the trained length; of the quick form only.
TRIED = {
    "clex, skips, no plain steps": [*_CLEX, *_SKIPS, *_NO_PLAIN],
    "clex, skips, reach of 64 x": [*_FAR, *_SKIPS],
    "clex, skips, reach of 64 x, no plain steps": [*_FAR, *_SKIPS, *_NO_PLAIN],
    "clex, skips, network 0 x": [*_CLEX, *_SKIPS, *_network(0)],
    "clex, skips, network 0.1 x": [*_CLEX, *_SKIPS, *_network(0.1)],
    "clex, release, network 0.01 x": [*_CLEX, "--release-recipe", *_network(0.01)],
}
# The mark is for three seeds.
BEST = ("clex, skips", "clex, skips, no plain steps", "clex, skips, reach of 64 x")


@dataclass(frozen=True)
class Run:
    """One fine-tune."""

    method: str
    options: tuple[str, ...]  # of mlx_clex.lora
    length: int  # of its sequences, tokens
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        method = self.method.replace(", ", "-").replace(" ", "")
        return f"{method}_{self.length}_{self.seed}"


def all_runs(size: Size) -> list[Run]:
    """In the order in which they are of use."""
    seeds = range(size.seeds)
    lengths = (TRAINED_LENGTH, 4 * TRAINED_LENGTH)
    runs = [
        Run(method, tuple(options), length, seed)
        for length in lengths
        for seed in seeds
        for method, options in METHODS.items()
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
    """The model that all runs of a seed start from."""
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
    """Do what is left of a run; its perplexities end up in its folder."""
    adapters = folder / run.name
    if (adapters / "perplexity.json").exists() and len(
        read_results(adapters / "perplexity").rows
    ) == len(MULTIPLES):
        return
    _lora(base, adapters, run, size, size.steps, size.learning_rate, folder)
    _python(
        [
            "-m",
            "benchmarks.extrapolation",
            "--measure",
            str(adapters),
            "--base",
            base,
            "--data",
            str(folder / "data"),
        ]
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
    """`mlx_clex.lora`, going on with what an earlier one has left."""
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


def measure(adapters: Path, base: str, data: Path) -> None:
    """Perplexity at each length, into the folder of the adapters."""
    model, tokenizer = load(base, adapter_path=adapters)
    assert isinstance(model, ScaledModel)
    corpus = load_corpora(
        data, tokenizer, mask_prompt=False, cache_dir=adapters.parent / "cache", splits=["valid"]
    )["valid"]
    longest = max(MULTIPLES) * TRAINED_LENGTH
    starts = windows_of(corpus, longest, MEASURED // longest)
    tokens = np.concatenate([corpus.tokens[start : start + longest] for start in starts])
    begin = np.arange(0, len(tokens), longest)
    corpus = Corpus("held-out books", tokens, begin, np.zeros(len(begin), int))
    settings = {"protocol": "whole", "tokens": len(tokens), "text": corpus.name}
    results = open_results(
        adapters / "perplexity", kind="perplexity", settings=settings, keys=("label", "length")
    )
    for multiple in MULTIPLES:
        length = multiple * TRAINED_LENGTH
        if results.find(length=length):
            continue
        found = score(model, corpus, length, len(tokens) // length)
        low, high = found.interval or (None, None)
        results.add(
            {
                "label": adapters.name,
                "trained_length": TRAINED_LENGTH,
                "reach": model.reach,
                "length": length,
                "scale": model.scale_at(length),
                "windows": len(found.losses),
                "tokens": found.tokens,
                "perplexity": found.perplexity,
                "low": low,
                "high": high,
            }
        )


def summary(runs: Sequence[Run], folder: Path) -> dict[tuple[str, int], list[Results]]:
    """The finished runs by method and training length, one for each seed."""
    found: dict[tuple[str, int], list[Results]] = {}
    for run in runs:
        file = folder / run.name / "perplexity.json"
        if file.exists():
            found.setdefault((run.method, run.length), []).append(read_results(file))
    return found


def print_table(found: dict[tuple[str, int], list[Results]]) -> None:
    """Perplexity by length, with the spread over seeds where there are several."""
    print("| method | trained at | " + " | ".join(f"{m}x" for m in MULTIPLES) + " |")
    print("|---" * (len(MULTIPLES) + 2) + "|")
    for (method, length), results in found.items():
        by_length = [_perplexities(results, m * TRAINED_LENGTH) for m in MULTIPLES]
        cells = [_with_spread(values) if values else "" for values in by_length]
        seeds = f" ({len(results)} seeds)" if len(results) > 1 else ""
        print(f"| {method}{seeds} | {length // TRAINED_LENGTH} x L0 | {' | '.join(cells)} |")


def _with_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _perplexities(results: Sequence[Results], length: int) -> list[float]:
    """Of all seeds that have been measured at a length."""
    rows = (result.find(length=length) for result in results)
    return [row["perplexity"] for row in rows if row is not None]


def draw_pictures(found: dict[tuple[str, int], list[Results]], folder: Path) -> None:
    """Perplexity against length, one picture for each training length; means over seeds."""
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
            if (values := _perplexities(results, multiple * TRAINED_LENGTH))
        ]
        settings = {"protocol": "whole", "trained at": trained}
        results = Results("perplexity", settings, ("label", "length"), rows)
        results.prefix = folder / f"trained-at-{trained}"
        results.write()
        picture(results)


def _curve(results: Results) -> str:
    return " ".join(f"{row['perplexity']:.2f}" for row in results.rows)


def main() -> None:
    """Run what is left, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="0.9 M parameters, about an hour.")
    parser.add_argument("--output", type=Path, help="Default: build/extrapolation-quick or -full.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time. Default: 1.")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="Of these methods.")
    parser.add_argument("--at", type=int, metavar="TOKENS", help="Trained at this length.")
    parser.add_argument("--seed", type=int, help="Of this seed.")
    parser.add_argument("--table", action="store_true", help="Of what there is; run nothing.")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.base, args.data)
        return
    size = QUICK if args.quick else FULL
    folder = args.output or Path("build") / f"extrapolation-{'quick' if args.quick else 'full'}"
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
        bases = {seed: make_base(size, seed, folder / "base") for seed in range(size.seeds)}
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
                except RunError as error:  # a method may not survive its own procedure
                    print(f"{name}: {error}", file=sys.stderr)
    found = summary(runs, folder)
    print_table(found)
    draw_pictures(found, folder)


if __name__ == "__main__":
    main()
