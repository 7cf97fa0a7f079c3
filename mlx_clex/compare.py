"""Command: compare the predictions of two models on the same text.

Examples: a converted and a quantised model, an unfrozen and a frozen one, bfloat16 and
float32. The command compares the next-token distributions and prints the differences by
position, because rotation errors grow with the position.

Not covered: models with different tokenizers.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from .bundled import PREFIX
from .checkpoint.fingerprint import fingerprint, short
from .commands.options import add_shared, check_least
from .commands.run_command import command
from .data.corpus import Corpus
from .errors import InputError
from .evaluation.corpus import corpus_of
from .evaluation.divergence import differences
from .evaluation.perplexity import (
    check_lengths,
    exp,
    windows_of,
)
from .evaluation.results import Results, alone, open_results
from .loading import load, resolve
from .model.scaled_model import scaled
from .pictures.draw import picture

_FIRST = 16  # positions below are one bucket; the others begin at powers of two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    for which, role in (("a", "the reference model"), ("b", "the model to compare with it")):
        parser.add_argument(
            which,
            metavar=which.upper(),
            help=f"A folder, a .gguf file or a Hugging Face id: {role}.",
        )
    for which in "ab":
        parser.add_argument(
            f"--adapter-path-{which}",
            help=f"A folder of adapters to put on top of {which.upper()}. Default: none.",
        )
    for which in "ab":
        parser.add_argument(
            f"--scale-{which}",
            type=float,
            help=f"Fixed scale of {which.upper()}. Default: the scale of the length.",
        )
    add_shared(parser, "--data", "--split", "--json")
    parser.add_argument(
        "--length", type=int, help="Length of the windows, tokens. Default: A's trained length."
    )
    parser.add_argument("--windows", type=int, default=8, help="Largest number of windows.")
    add_shared(
        parser,
        "--output",
        help="Write PREFIX.json, PREFIX.csv and PREFIX.png. Default: no files.",
    )
    add_shared(parser, "--trust-remote-code", help="Let the tokenizers run their own Python.")


def run(args: argparse.Namespace) -> None:
    """Compare two models and print a table.

    Raises:
        InputError: the models cannot be compared, or the text or length cannot be used.
    """
    check_least(args, "windows", 1)
    with alone(args.output):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    a, tokenizer = _load(args, "a")
    corpus = corpus_of(args.data, args.split, tokenizer)
    b, tokenizer = _load(args, "b")
    if corpus_of(args.data, args.split, tokenizer).digest != corpus.digest:
        raise InputError(
            f"{args.a} and {args.b} tokenise the text differently. Compare models with the same "
            "tokenizer."
        )
    length = scaled(a).trained_length if args.length is None else args.length
    if length is None:
        raise InputError(f"The trained length of {args.a} is unknown. Give --length.")
    for model in (a, b):
        check_lengths(model, corpus, [length], "--length")
    settings = {
        **{
            f"weights_{which}": _digest(args, which, model) for which, model in (("a", a), ("b", b))
        },
        "tokens": corpus.digest,
        "length": length,
        "windows": args.windows,
    }
    results = open_results(args.output, kind="compare", settings=settings, keys=["first"])
    # A run that was killed may lack the last rows.
    if len(results.rows) < len(buckets(length)):
        _measure(args, a, b, corpus, length, results)
    picture(results)
    if args.json:
        print(json.dumps({"length": length, "results": results.rows}))
    else:
        _print_table(args, results)


def _load(args: argparse.Namespace, which: str) -> tuple[nn.Module, Any]:
    return load(
        getattr(args, which),
        scale=getattr(args, f"scale_{which}"),
        adapter_path=getattr(args, f"adapter_path_{which}"),
        trust_remote_code=args.trust_remote_code,
    )


def _digest(args: argparse.Namespace, which: str, model: nn.Module) -> str:
    folder = resolve(getattr(args, which))
    return short(fingerprint(model, folder, getattr(args, f"adapter_path_{which}")))


def _measure(
    args: argparse.Namespace,
    a: nn.Module,
    b: nn.Module,
    corpus: Corpus,
    length: int,
    results: Results,
) -> None:
    windows = windows_of(corpus, length, args.windows)
    labels = dict(zip(("label_a", "label_b"), _labels(args), strict=True))
    total = np.zeros((length - 1, 4))
    with tqdm(
        total=len(windows) * (length - 1), unit="tok", unit_scale=True, leave=False, disable=None
    ) as bar:
        for start in windows:
            ids = corpus.tokens[start : start + length]
            total += differences(a, b, ids, bar.update)
    for first, last in buckets(length):
        kl, flips, loss_a, loss_b = total[first - 1 : last].mean(axis=0) / len(windows)
        results.add(
            {
                "first": first,
                "last": last,
                "tokens": (last - first + 1) * len(windows),
                "kl": kl,
                "flips": flips,
                "perplexity_a": exp(loss_a),
                "perplexity_b": exp(loss_b),
                "text": corpus.name,
                "model_a": args.a,
                "model_b": args.b,
                **labels,
            }
        )


def _labels(args: argparse.Namespace) -> list[str]:
    """Return a short name for each model, with its adapters and its scale."""
    names = [Path(path).name.removeprefix(PREFIX) for path in (args.a, args.b)]
    if names[0] == names[1]:
        names = [args.a, args.b]
    for index, (adapters, scale) in enumerate(
        ((args.adapter_path_a, args.scale_a), (args.adapter_path_b, args.scale_b))
    ):
        names[index] += f" + {Path(adapters).name}" if adapters else ""
        names[index] += f" at scale {scale:g}" if scale else ""
    return names


def buckets(length: int) -> list[tuple[int, int]]:
    """Return the first and last position of each bucket, for texts of this length.

    The buckets are 1..15, 16..31, 32..63, ...; the last one ends at length - 1.
    """
    starts = [1]
    while max(_FIRST, 2 * starts[-1]) < length:
        starts.append(max(_FIRST, 2 * starts[-1]))
    return list(zip(starts, [*(start - 1 for start in starts[1:]), length - 1], strict=True))


def _print_table(args: argparse.Namespace, results: Results) -> None:
    print(f"A: {args.a}. B: {args.b}.")
    print(
        "KL: KL(A || B) of the next-token distributions, nats; flips: share of positions where the "
        "most likely tokens differ."
    )
    heads = ("tokens", "KL", "flips", "perplexity A", "perplexity B")
    print(f"{'position':>15}" + "".join(f" {head:>12}" for head in heads))
    # Rows store NaN as None.
    rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in results.rows]
    for row in [*rows, _whole(rows)]:
        place = f"{row['first']}-{row['last']}" if "first" in row else "all"
        print(
            f"{place:>15} {row['tokens']:>12} {row['kl']:>12.3e} {row['flips']:>12.2%}"
            f" {row['perplexity_a']:>12.4f} {row['perplexity_b']:>12.4f}"
        )


def _whole(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    """Return the row of all positions together."""
    tokens = np.array([row["tokens"] for row in rows])

    def mean(values: Any) -> float:
        return float(np.average(values, weights=tokens))

    return {
        "tokens": tokens.sum(),
        **{name: mean([row[name] for row in rows]) for name in ("kl", "flips")},
        **{
            name: exp(mean([math.log(row[name]) for row in rows]))
            for name in ("perplexity_a", "perplexity_b")
        },
    }


main = command("compare", add_arguments, run, "my-model my-model-4bit --length 4096")


if __name__ == "__main__":
    sys.exit(main())
