"""Command: perplexity of a model on a text, at chosen lengths.

The protocol is *whole*: every sequence in one pass, at the scale of its whole length. The
output names it, since figures of other protocols do not compare.

Not covered: reading in chunks with a cache, and sliding windows.
"""

import argparse
import json
import sys
from pathlib import Path

from .attach import ScaledModel
from .cli import run_command
from .errors import InputError
from .load import DEFAULT_CACHE, load
from .training.data import load_corpora
from .training.evaluation import check_lengths, perplexity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--model", required=True, help="A folder, a .gguf file or a Hugging Face id."
    )
    parser.add_argument("--adapter-path", help="A folder of adapters to put on top.")
    parser.add_argument(
        "--data", required=True, help="A .txt or .md file, or a folder as for mlx_clex.lora."
    )
    parser.add_argument(
        "--split",
        default="train",
        choices=("train", "valid", "test"),
        help="Which part of a folder. Default: train, which is all of a folder of texts.",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="Default: 1, 2 and 4 times the trained length.",
    )
    parser.add_argument(
        "--windows", type=int, default=8, help="Sequences at each length, at most. Default: 8."
    )
    parser.add_argument("--protocol", choices=("whole",), default="whole")
    parser.add_argument("--scale", type=float, help="Hold the model at this scale.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Let the tokenizer run its own Python."
    )


def run(args: argparse.Namespace) -> None:
    """Measure and print a table.

    Raises:
        InputError: the text is too short or a length beyond the model's reach.
    """
    if args.windows < 1:
        raise InputError(f"--windows must be at least 1, got {args.windows}.")
    model, tokenizer = load(
        args.model,
        scale=args.scale,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    if not isinstance(model, ScaledModel) and args.lengths is None:
        raise InputError(f"{args.model} has no scaling of ours: give --lengths, in tokens.")
    lengths = args.lengths or [n * model.scaling.trained_length for n in (1, 2, 4)]
    corpora = load_corpora(
        Path(args.data).expanduser(),
        tokenizer,
        mask_prompt=False,
        cache_dir=DEFAULT_CACHE,
        splits=[args.split],
    )
    if args.split not in corpora:
        raise InputError(f"--data {args.data} has no {args.split} part.")
    corpus = corpora[args.split]
    check_lengths(model, corpus, lengths)
    found = []
    for length in lengths:
        count = min(args.windows, (len(corpus.tokens) - 1) // length)
        scale = model.scale_at(length) if isinstance(model, ScaledModel) else 1.0
        value = perplexity(model, corpus, length, args.windows)
        found.append({"length": length, "scale": scale, "windows": count, "perplexity": value})
        if not args.json:
            if len(found) == 1:
                print(f"Protocol whole: {args.data}, {len(corpus.tokens)} tokens.")
                print(f"{'tokens':>8} {'scale':>7} {'windows':>8} {'perplexity':>11}")
            print(f"{length:>8} {scale:>7g} {count:>8} {value:>11.4f}", flush=True)
    if args.json:
        print(json.dumps({"protocol": args.protocol, "results": found}))


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(
        run_command(
            add_arguments,
            run,
            prog="mlx_clex.perplexity",
            description="Perplexity of a model on a text, at chosen lengths.",
        )
    )


if __name__ == "__main__":
    main()
