"""Command: measure the perplexity of models on a text, by length.

Each result comes with its protocol, the number of windows and a confidence interval. Results
of different protocols or tokenizers cannot be compared, so a run has one of each. All models
and lengths are checked before the first measurement. Each result is stored at once.

Not covered: models with different tokenizers (bits per byte would compare them).
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from tqdm import tqdm

from .bundled import MODELS
from .commands.help import point_elsewhere
from .commands.options import add_shared, check_cache_options, check_least, loading_options
from .commands.run_command import command
from .data.corpus import Corpus
from .errors import InputError
from .evaluation.candidates import (
    Candidate,
    Loader,
    default_lengths,
    labels_of,
    only_bundled,
    replacement,
)
from .evaluation.corpus import corpus_of
from .evaluation.perplexity import Protocol, check_lengths, check_targets
from .evaluation.perplexity_table import (
    AIMED_TOKENS,
    SAME_TARGETS,
    SMALLEST_WINDOWS,
    Measuring,
    measure,
)
from .evaluation.results import alone, open_results
from .model.scaled_model import scaled
from .pictures.draw import picture
from .scaling import SCALINGS

_KEYS = ("label", "length")
_BUNDLED_SCALINGS = ("none", "ntk", "yarn", "yarn-t")  # measured on the bundled base by default
_BUNDLED_OUTPUT = "perplexity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--model",
        nargs="+",
        help="Folders, .gguf files or Hugging Face ids. Default: the bundled models, and the "
        "bundled base with inference-time scalings.",
    )
    add_shared(
        parser,
        *("--adapter-path", "--trust-remote-code", "--split", "--own-rope"),
        *("--kv-group-size", "--json"),
    )
    add_shared(parser, "--data", aliases=["--data-path"])
    parser.add_argument(
        "--lengths",
        "--sequence-length",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="Lengths of the windows. Default: 1, 2 and 4 times the trained length; for the "
        "bundled models, up to 16 times.",
    )
    parser.add_argument(
        "--windows",
        "--num-samples",
        type=int,
        help=f"Largest number of windows of each length. Default: {SMALLEST_WINDOWS}, or "
        f"{AIMED_TOKENS} / length if that is more; for same-targets {2 * AIMED_TOKENS} / the "
        "longest length.",
    )
    parser.add_argument(
        "--protocol",
        choices=(SAME_TARGETS, "whole", "chunked", "sliding"),
        default=SAME_TARGETS,
        help=f"{SAME_TARGETS}: only the last tokens of each window, as many as the trained length; "
        "they are the same at every length, with all the context that it gives. Each perplexity "
        "is also divided by that of the shortest length, window by window. whole: all tokens of "
        "each window, at the scale of its length. chunked: each window in chunks, with a growing "
        "scale, as CLEX was published. sliding: overlapping windows, each whole, as GeNE was "
        f"published. Default: {SAME_TARGETS}.",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="TOKENS",
        help="Tokens in a chunk, for --protocol chunked. Default: the trained length.",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="Tokens between the starts of windows, for --protocol sliding. Default: a quarter of "
        "the length.",
    )
    parser.add_argument(
        "--scale", type=float, help="Fixed scale. Default: the scale of each length."
    )
    parser.add_argument(
        "--scalings",
        nargs="+",
        choices=list(SCALINGS),
        metavar="NAME",
        help="Replace the scaling of the models by each of these and measure: "
        f"{', '.join(SCALINGS)}.",
    )
    parser.add_argument(
        "--factor",
        type=float,
        help="Longest length / trained length, for --scalings. Default: the longest of --lengths / "
        "trained length. It has no effect on none and dynamic.",
    )
    add_shared(parser, "--kv-bits", choices=(2, 3, 4, 5, 6, 8))
    add_shared(
        parser,
        "--output",
        help="Write PREFIX.json, PREFIX.csv and PREFIX.png. An interrupted run continues from "
        f"them. Default: {_BUNDLED_OUTPUT} for the bundled models, else no files.",
    )
    point_elsewhere(
        parser,
        {
            "--batch-size": "Short windows are batched automatically. Leave it out.",
            "--seed": "Windows are spread evenly over the text, not drawn. Leave it out.",
        },
    )


def run(args: argparse.Namespace) -> None:
    """Measure perplexities and print a table.

    Raises:
        InputError: an option, the text, a length or a model cannot be used.
    """
    _check(args)
    output = args.output or (None if args.model else _BUNDLED_OUTPUT)
    with alone(output):
        _run(args, output)


def _run(args: argparse.Namespace, output: str | None) -> None:
    loader = Loader(**loading_options(args), own_rope=args.own_rope)
    corpus, lengths, lines = _checked(args, loader)
    options = {f.name: getattr(args, f.name) for f in fields(Measuring) if f.name != "targets"}
    measuring = Measuring(targets=_targets(args, corpus, lengths, lines), **options)
    results = open_results(
        output,
        kind="perplexity",
        settings=_settings(measuring, corpus, lengths, lines),
        keys=_KEYS,
    )
    for line in lines:
        results.check_model(line.label, line.model)
    try:
        rows = measure(
            measuring,
            loader,
            results,
            corpus,
            lengths,
            lines,
            show=_silence if args.json else tqdm.write,
        )
    finally:
        picture(results)
    if args.json:
        print(json.dumps({"protocol": args.protocol, "results": rows}))


def _check(args: argparse.Namespace) -> None:
    """Refuse invalid options before anything is loaded."""
    check_least(args, "windows", 1)
    check_cache_options(args)
    for option, of in (("chunk", "chunked"), ("stride", "sliding")):
        if getattr(args, option) is not None and args.protocol != of:
            raise InputError(f"--{option} needs --protocol {of}, got {args.protocol}.")
    Protocol(chunk=args.chunk, stride=args.stride)
    if args.factor is not None and not args.scalings:
        raise InputError("--factor needs --scalings. Give --scalings, or leave out --factor.")
    if args.factor is not None and not 1 <= args.factor < math.inf:
        raise InputError(f"--factor must be at least 1 and finite, got {args.factor:g}.")
    if args.factor is not None and not any(SCALINGS[n].options_for(2) for n in args.scalings):
        raise InputError(
            f"--factor has no effect on --scalings {' '.join(args.scalings)}. Leave it out."
        )
    if args.own_rope is not None and not args.scalings:
        raise InputError("--own-rope needs --scalings NAME ...: add it.")
    if args.scale is not None and args.scalings:
        raise InputError("--scale and --scalings exclude each other. Use --factor with --scalings.")


def _checked(args: argparse.Namespace, loader: Loader) -> tuple[Corpus, list[int], list[Candidate]]:
    """Load and check each model once; return the text, the lengths and the lines."""
    corpus: Corpus | None = None
    lengths: list[int] = []
    lines: list[Candidate] = []
    for label, path, scalings in _models(args):
        model, tokenizer = loader.load(path)
        own = corpus_of(args.data, args.split, tokenizer)
        if corpus is None:
            corpus = own
            lengths = sorted(set(args.lengths or ())) or default_lengths(
                model, label, bundled=only_bundled(args.model)
            )
        elif own.digest != corpus.digest:
            raise InputError(
                f"{label} and {lines[0].label} tokenise the text differently, so their "
                "perplexities cannot be compared. Measure them in separate runs."
            )
        if args.protocol == "chunked" and not (args.chunk or scaled(model).trained_length):
            raise InputError(f"The trained length of {label} is unknown. Give --chunk.")
        for name in scalings or (None,):
            lines.append(_line(args, loader, label, path, name, lengths[-1]))
            check_lengths(model, corpus, lengths)
    assert corpus is not None, "there is at least one model"
    return corpus, lengths, lines


def _models(args: argparse.Namespace) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Yield (label, path, replacements of its scaling) of each model."""
    scalings = tuple(dict.fromkeys(args.scalings or ()))
    for label, path in labels_of(args.model, args.adapter_path).items():
        if args.model or path == MODELS["base"]:
            yield label, path, scalings or (() if args.model else _BUNDLED_SCALINGS)
        elif not scalings:  # they are for the bundled base only
            yield label, path, ()


def _line(
    args: argparse.Namespace, loader: Loader, label: str, path: str, name: str | None, longest: int
) -> Candidate:
    """Return the line of a model with its own scaling, or with the scaling `name` attached."""
    entry = None
    if name is not None:
        trained = scaled(loader.load(path)[0]).trained_length
        added, entry = replacement(name, args.factor or max(1.0, longest / (trained or longest)))
        label += f" + {added}"
    if args.scale is not None:
        label += f" at scale {args.scale:g}"
    return loader.candidate(label, path, entry)


def _settings(
    measuring: Measuring, corpus: Corpus, lengths: Sequence[int], lines: Sequence[Candidate]
) -> dict[str, Any]:
    """Return everything that affects the figures and is not in the rows."""
    chunks = {measuring.chunk_of(line) for line in lines}
    settings = {
        "tokens": corpus.digest,
        # Number of texts that are read; 0: all texts joined.
        "texts": int((corpus.ends - corpus.starts >= lengths[-1]).sum()),
        **asdict(measuring),
        "chunk": chunks.pop() if len(chunks) == 1 else None,  # None: each model's trained length
    }
    if measuring.protocol == SAME_TARGETS:
        # Windows end where those of the longest length do; ratios are to the shortest.
        settings |= {"shortest": lengths[0], "longest": lengths[-1]}
    if not measuring.kv_bits:
        del settings["kv_bits"], settings["kv_group_size"]
    return settings


def _targets(
    args: argparse.Namespace, corpus: Corpus, lengths: Sequence[int], lines: Sequence[Candidate]
) -> int | None:
    """Return how many tokens of a window count under same-targets; None for other protocols.

    These are the trained length, of several models the smallest; the shortest of the lengths
    where no trained length is known.
    """
    if args.protocol != SAME_TARGETS:
        return None
    known = [line.trained_length for line in lines if line.trained_length is not None]
    targets = min(known, default=lengths[0])
    check_targets(corpus, lengths, targets)
    return targets


def _silence(text: str) -> None:
    """Print nothing: --json replaces the table."""


main = command(
    "perplexity", add_arguments, run, "--model my-model --data book.txt --lengths 4096 16384"
)


if __name__ == "__main__":
    sys.exit(main())
