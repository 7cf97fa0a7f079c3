"""Command: perplexity of models on a text, by length.

Every figure says how it was taken: the protocol, how many windows, and a confidence interval
over them. Figures of other protocols or other tokenizers do not compare, so one run has one
of each. Everything is checked before anything is measured, and every figure is kept as soon
as it is there.

Not covered: weights that do not share a tokenizer (bits per byte would compare them).
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
from tqdm import tqdm

from .bundled import MODELS, PREFIX
from .checkpoint.fingerprint import fingerprint, short
from .commands.help import point_elsewhere
from .commands.run_command import run_command
from .data.corpus import Corpus
from .errors import InputError
from .evaluation.corpus import corpus_of
from .evaluation.perplexity import Protocol, Score, check_lengths, score, windows_of
from .evaluation.results import Results, open_results
from .loading import load, resolve
from .model.scaled_model import attach, scaled
from .pictures.draw import picture
from .scaling import SCALINGS

_KEYS = ("label", "length")
_TIMES = (1, 2, 4)  # the trained length: --lengths, unless given
_BUNDLED_TIMES = (1, 2, 4, 8, 16)
_BUNDLED_SCALINGS = ("none", "ntk", "yarn")  # of the bundled base
_BUNDLED_OUTPUT = "perplexity"
# --windows, unless given: this many, and of short ones as many as these tokens make.
_WINDOWS = 8
_TOKENS = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--model",
        nargs="+",
        help="Folders, .gguf files or Hugging Face ids. Default: the bundled models, and the "
        "bundled base with inference-time scalings.",
    )
    parser.add_argument("--adapter-path", help="A folder of adapters to put on top of the model.")
    parser.add_argument(
        "--data",
        "--data-path",
        help="A .txt, .md or .jsonl file, a folder of them, or OWNER/NAME of a data set on the "
        "hub. "
        "Default: the bundled text.",
    )
    parser.add_argument(
        "--split",
        default="train",
        choices=("train", "valid", "test"),
        help="Which part of a folder. Default: train, which is all of a folder of texts.",
    )
    parser.add_argument(
        "--lengths",
        "--sequence-length",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="Lengths of the windows. Default: 1, 2 and 4 times the trained length; of the bundled "
        "models, up to 16 times.",
    )
    parser.add_argument(
        "--windows",
        "--num-samples",
        type=int,
        help=f"Windows of each length, at most. Default: {_WINDOWS}, and of short ones as many as "
        f"{_TOKENS} tokens make.",
    )
    parser.add_argument(
        "--protocol",
        choices=("whole", "chunked", "sliding"),
        default="whole",
        help="whole: every window at the one scale of its length. chunked: as CLEX was published, "
        "fed in chunks, the scale growing. sliding: as GeNE was published, windows that overlap, "
        "each whole. Default: whole.",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="TOKENS",
        help="Tokens that are read at once, for chunked. Default: the trained length.",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="Tokens from one window to the next, for sliding. Default: a quarter of a window.",
    )
    parser.add_argument(
        "--scale", type=float, help="Hold the models at this scale. Default: that of each length."
    )
    parser.add_argument(
        "--scalings",
        nargs="+",
        choices=list(SCALINGS),
        metavar="NAME",
        help="Measure the same weights with each of these in place of their own scaling: "
        f"{', '.join(SCALINGS)}.",
    )
    parser.add_argument(
        "--factor",
        type=float,
        help="Longest length / trained length, for --scalings. Default: that of --lengths. It has "
        "no "
        "effect on none and dynamic.",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(2, 3, 4, 5, 6, 8),
        help="Bits of the KV cache. Default: not quantised.",
    )
    parser.add_argument(
        "--kv-group-size", type=int, default=64, help="Values of the KV cache that share a scale."
    )
    parser.add_argument(
        "--output",
        metavar="PREFIX",
        help="Write PREFIX.json, PREFIX.csv and PREFIX.png; a run that was interrupted goes on "
        f"from them. Default: of the bundled models, {_BUNDLED_OUTPUT}.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Let the tokenizer run its own Python."
    )
    point_elsewhere(
        parser,
        {
            "--batch-size": "Rows are read together as far as memory allows. Leave it out.",
            "--seed": "Windows are spread evenly over the text; nothing is drawn. Leave it out.",
        },
    )


def run(args: argparse.Namespace) -> None:
    """Measure, and print a table.

    Raises:
        InputError: options, a text, lengths or models that cannot be used.
    """
    _check(args)
    loader = _Loader(args)
    corpus, lengths, lines = _checked_lines(args, loader)
    results = open_results(
        args.output or (None if args.model else _BUNDLED_OUTPUT),
        kind="perplexity",
        settings=_settings(args, corpus, lengths[-1], lines),
        keys=_KEYS,
    )
    for line in lines:
        results.check_model(line.label, line.model)
    try:
        rows = _measure(args, loader, results, corpus, lengths, lines)
    finally:
        picture(results)
    if args.json:
        print(json.dumps({"protocol": args.protocol, "results": rows}))


@dataclass(frozen=True)
class Candidate:
    """A model to load."""

    name: str  # to show
    path: str  # a folder, file or hub id
    scalings: Sequence[str] = ()  # to put in place of its own; none: its own


@dataclass(frozen=True)
class Line:
    """A line of the picture: a model as it is, or with another scaling."""

    label: str
    path: str
    entry: Mapping[str, Any] | None  # a rope_scaling in place of its own
    model: str  # digest of all that decides its answers
    trained_length: int | None  # tokens
    reach: int | None  # tokens


class _Loader:
    """Loads models, and keeps the last one."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path = ""
        self.loaded: tuple[Any, ...] = ()

    def load(self, path: str) -> tuple[nn.Module, Any]:
        """(model, tokenizer)."""
        if path != self.path:
            self.path, self.loaded = "", ()  # the memory of the last one is needed
            self.loaded = load(
                path,
                scale=self.args.scale,
                adapter_path=self.args.adapter_path,
                trust_remote_code=self.args.trust_remote_code,
            )
            self.path = path
        return self.loaded[0], self.loaded[1]

    def with_scaling(self, path: str, entry: Mapping[str, Any] | None) -> nn.Module:
        """The model, with another scaling in place of its own unless that is None."""
        model, _ = self.load(path)
        if entry is not None:
            attach(model, entry, trained_length=scaled(model).trained_length)
        return model


def _check(args: argparse.Namespace) -> None:
    """Refuse options before anything is loaded."""
    if args.adapter_path and len(args.model or MODELS) > 1:
        raise InputError("--adapter-path goes with a single --model.")
    if args.windows is not None and args.windows < 1:
        raise InputError(f"--windows must be at least 1, got {args.windows}.")
    for option, of in (("chunk", "chunked"), ("stride", "sliding")):
        if getattr(args, option) is not None and args.protocol != of:
            raise InputError(f"--{option} goes with --protocol {of}, not {args.protocol}.")
    Protocol(chunk=args.chunk, stride=args.stride)
    if args.factor is not None and not args.scalings:
        raise InputError("--factor is that of --scalings, which were not given.")
    if args.factor is not None and not args.factor >= 1:
        raise InputError(f"--factor must be at least 1, got {args.factor:g}.")
    if args.factor is not None and not any(SCALINGS[n].options_for(2) for n in args.scalings):
        raise InputError(
            f"--factor changes nothing of --scalings {' '.join(args.scalings)}: leave it out."
        )
    if args.scale is not None and args.scalings:
        raise InputError("--scale and --scalings exclude each other; their scale is --factor.")


def _candidates(args: argparse.Namespace) -> list[Candidate]:
    """What to load."""
    scalings = tuple(dict.fromkeys(args.scalings or ()))
    if not args.model:
        base, *tuned = (Candidate(name, model) for name, model in MODELS.items())
        if scalings:
            return [replace(base, scalings=scalings)]
        return [replace(base, scalings=_BUNDLED_SCALINGS), *tuned]
    paths = list(dict.fromkeys(args.model))
    names = [Path(path).name.removeprefix(PREFIX) or path for path in paths]
    if len(set(names)) < len(names):
        names = paths
    if args.adapter_path:
        names = [f"{names[0]} + {Path(args.adapter_path).name}"]
    return [Candidate(name, path, scalings) for name, path in zip(names, paths, strict=True)]


def _checked_lines(
    args: argparse.Namespace, loader: _Loader
) -> tuple[Corpus, list[int], list[Line]]:
    """The text, the lengths, and the lines; every model has been loaded once and checked."""
    corpus: Corpus | None = None
    lengths: list[int] = []
    lines: list[Line] = []
    for source in _candidates(args):
        model, tokenizer = loader.load(source.path)
        own = corpus_of(args.data, args.split, tokenizer)
        if corpus is None:
            corpus, lengths = own, _lengths(args, model, source.name)
        elif own.digest != corpus.digest:
            raise InputError(
                f"{source.name} and {lines[0].label} read the text as different tokens, so their "
                "perplexities do not compare: measure them in runs of their own."
            )
        if args.protocol == "chunked" and not (args.chunk or scaled(model).trained_length):
            raise InputError(f"{source.name} does not say its trained length: give --chunk.")
        for name in source.scalings or (None,):
            lines.append(_line(args, loader, source, name, lengths[-1]))
            check_lengths(model, corpus, lengths)
    assert corpus is not None, "there is at least one model"
    return corpus, lengths, lines


def _line(
    args: argparse.Namespace, loader: _Loader, source: Candidate, name: str | None, longest: int
) -> Line:
    """A model as it is, or with the scaling of this name; it stays loaded so."""
    label, entry = source.name, None
    trained = scaled(loader.load(source.path)[0]).trained_length
    if name is not None:
        factor = args.factor
        if factor is None:
            factor = max(1.0, longest / (trained or longest))
        options = SCALINGS[name].options_for(factor)
        entry = {"type": name, **options}
        label += f" + {' '.join([name, *(f'{value:g}' for value in options.values())])}"
    if args.scale is not None:
        label += f" at scale {args.scale:g}"
    model = loader.with_scaling(source.path, entry)
    return Line(
        label,
        source.path,
        entry,
        short(fingerprint(model, resolve(source.path), args.adapter_path)),
        trained,
        scaled(model).reach,
    )


def _lengths(args: argparse.Namespace, model: nn.Module, name: str) -> list[int]:
    """The lengths to measure, shortest first."""
    if args.lengths:
        return sorted(set(args.lengths))
    trained = scaled(model).trained_length
    if trained is None:
        raise InputError(f"{name} does not say its trained length: give --lengths.")
    times = _TIMES if args.model else _BUNDLED_TIMES
    limit = scaled(model).limit
    return [n * trained for n in times if limit is None or n * trained <= limit]


def _settings(
    args: argparse.Namespace, corpus: Corpus, longest: int, lines: Sequence[Line]
) -> dict[str, Any]:
    """All that changes a figure, but for what the rows name."""
    cache = ("kv_bits", "kv_group_size") if args.kv_bits else ()
    names = ("protocol", "stride", "windows", *cache)
    chunks = {_chunk(args, line) for line in lines}
    return {
        "tokens": corpus.digest,
        # That are read; 0: all as one.
        "texts": int((corpus.ends - corpus.starts >= longest).sum()),
        **{name: getattr(args, name) for name in names},
        "chunk": chunks.pop() if len(chunks) == 1 else None,  # None: of each its trained length
    }


def _chunk(args: argparse.Namespace, line: Line) -> int | None:
    return args.chunk or line.trained_length if args.protocol == "chunked" else None


def _protocol(args: argparse.Namespace, line: Line, length: int) -> Protocol:
    if args.protocol == "chunked":
        return Protocol(chunk=_chunk(args, line))
    if args.protocol == "sliding":
        return Protocol(stride=args.stride or max(1, length // 4))
    return Protocol()


def _windows(args: argparse.Namespace, length: int) -> int:
    return args.windows or max(_WINDOWS, _TOKENS // length)


def _measure(
    args: argparse.Namespace,
    loader: _Loader,
    results: Results,
    corpus: Corpus,
    lengths: list[int],
    lines: list[Line],
) -> list[dict[str, Any]]:
    """The rows of all lines, printed as they come; what the results have is not measured."""
    show = _silence if args.json else tqdm.write
    width = max(len(line.label) for line in lines)
    show(f"Protocol {args.protocol}: {corpus.name}, {len(corpus.tokens)} tokens.")
    if (corpus.ends - corpus.starts).max() < lengths[-1]:
        show(f"No text of it has {lengths[-1]} tokens: all are read as one, end to end.")
    if any(line.entry for line in lines):
        show("MODEL + SCALING: inference-time scaling only, the weights stay as they are.")
    show(
        f"{'model':{width}} {'tokens':>8} {'scale':>7} {'windows':>8} {'perplexity':>11}   "
        "95 % interval"
    )
    rows = []
    with tqdm(
        total=_tokens_to_read(args, results, corpus, lengths, lines),
        unit="tok",
        unit_scale=True,
        leave=False,
        disable=None,
    ) as bar:
        for line in lines:
            for length in lengths:
                if not results.find(label=line.label, length=length):
                    bar.set_description(f"{line.label}, {length} tokens")
                    model = loader.with_scaling(line.path, line.entry)
                    found = _score(args, model, corpus, line, length, lengths[-1], bar.update)
                    results.add(_row(model, line, length, found, corpus.name))
                row = results.find(label=line.label, length=length)
                assert row is not None
                rows.append(row)
                show(_text(row, width))
    if len(lines) > 1:
        show("\nPerplexity by length, in tokens:")
        show(f"{'':{width}}" + "".join(f" {length:>9}" for length in lengths))
        for line in lines:
            mine = [row["perplexity"] for row in rows if row["label"] == line.label]
            show(f"{line.label:{width}}" + "".join(f" {_number(value, 9)}" for value in mine))
    return rows


def _tokens_to_read(
    args: argparse.Namespace,
    results: Results,
    corpus: Corpus,
    lengths: list[int],
    lines: list[Line],
) -> int:
    total = 0
    for line in lines:
        for length in lengths:
            if not results.find(label=line.label, length=length):
                stride = _protocol(args, line, length).stride
                windows = _windows(args, length)
                places = windows_of(corpus, length, windows, stride, lengths[-1])
                total += len(places) * (length - 1)  # nothing follows the last token
    return total


def _score(
    args: argparse.Namespace,
    model: nn.Module,
    corpus: Corpus,
    line: Line,
    length: int,
    longest: int,
    on_read: Callable[[int], Any],
) -> Score:
    return score(
        model,
        corpus,
        length,
        _windows(args, length),
        _protocol(args, line, length),
        longest,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        on_read=on_read,
    )


def _row(model: nn.Module, line: Line, length: int, found: Score, text: str) -> dict[str, Any]:
    low, high = found.interval or (None, None)
    return {
        "label": line.label,
        "text": text,
        "inference_time": line.entry is not None,
        "trained_length": line.trained_length,
        "reach": line.reach,
        "length": length,
        "scale": scaled(model).scale_at(length),
        "windows": len(found.losses),
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "low": low,
        "high": high,
        "model": line.model,
    }


def _text(row: Mapping[str, Any], width: int) -> str:
    interval = "" if row["low"] is None else f"{row['low']:.4g} .. {row['high']:.4g}"
    return (
        f"{row['label']:{width}} {row['length']:>8} {row['scale']:>7g} {row['windows']:>8} "
        f"{_number(row['perplexity'], 11)}   {interval}"
    ).rstrip()


def _number(value: float | None, width: int) -> str:
    # The largest ones are those of a model that has lost the thread: their digits say nothing.
    return (
        f"{'nan' if value is None else f'{value:.4f}' if value < 1e4 else f'{value:.3g}':>{width}}"
    )


def _silence(text: str) -> None:
    """In the place of a table that was not asked for."""


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(
        run_command(
            add_arguments,
            run,
            prog="mlx_clex.perplexity",
            description="Perplexity of models on a text, by length.",
            example="mlx_clex perplexity --model my-model --data book.txt --lengths 4096 16384",
        )
    )


if __name__ == "__main__":
    main()
