"""Command: measure how often a model finds a fact that is hidden in a long text.

The command measures a grid of lengths and depths. A length is that of prompt and answer
together, in tokens; a prompt has as much filler as fits. Each prompt is read at the scale of
its own length, as in `generate`. Prompts of a grid share most of the text before the fact,
which is read once if that does not change the answers.

Not covered: chat templates (the model continues the prompt), and sampling.
"""

import argparse
import sys
from typing import Any

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from .commands.options import add_shared, check_cache_options, check_least, loading_options
from .commands.run_command import command
from .errors import InputError
from .evaluation.candidates import (
    Candidate,
    Loader,
    default_lengths,
    labels_of,
    only_bundled,
)
from .evaluation.reader import Reader, advancing
from .evaluation.results import Results, alone, open_results
from .evaluation.tasks import TASKS
from .loading import resolve
from .model.scaled_model import scaled
from .pictures.draw import picture

_KEYS = ("task", "label", "length", "depth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--model",
        nargs="+",
        help="Folders, .gguf files or Hugging Face ids. Default: the bundled models.",
    )
    add_shared(
        parser,
        *("--adapter-path", "--trust-remote-code", "--prefill-step-size"),
        *("--kv-bits", "--kv-group-size", "--quantized-kv-start", "--output"),
    )
    parser.set_defaults(quantized_kv_start=0)  # what is quantised is what is measured
    parser.add_argument(
        "--task",
        choices=list(TASKS),
        help="passkey: a number in repeated sentences, as in GeNE. number, kv: InfiniteBench's "
        "retrieval of a number and of a value by its key. words: a number among verses, which the "
        "bundled models have learned. Default: passkey; for the bundled models, words.",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="Tokens of prompt and answer together. Default: 1, 2 and 4 times the trained length; "
        "for the bundled models, up to 16 times.",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="SHARE",
        help="Position of the fact, 0 (before the filler) to 1 (after it). Default: 0 0.25 0.5 "
        "0.75 1.",
    )
    parser.add_argument("--trials", type=int, default=10, help="Trials at each length and depth.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the facts.")
    add_shared(
        parser,
        "--scale",
        help="prompt: each prompt uses the scale of its own length. grow: the scale of the length "
        "read so far. NUMBER: a fixed scale.",
    )


def run(args: argparse.Namespace) -> None:
    """Run the trials and print a table for each model.

    Raises:
        InputError: an option, a length or a model cannot be used.
        RunError: MLX failed.
    """
    _check(args)
    with alone(args.output):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    models = labels_of(args.model, args.adapter_path)
    for path in models.values():
        resolve(path)
    loader = Loader(**loading_options(args))
    # Check all models before the first is measured, which may take hours.
    checked = []
    for label, path in models.items():
        candidate = loader.candidate(label, path)
        checked.append((candidate, _lengths(args, loader.load(path)[0], label)))
    results = open_results(args.output, kind="passkey", settings=_settings(args), keys=_KEYS)
    for candidate, _ in checked:
        results.check_model(candidate.label, candidate.model)
    try:
        for candidate, lengths in checked:
            _measure(args, results, loader, candidate, lengths)
    finally:
        picture(results)


def _check(args: argparse.Namespace) -> None:
    """Refuse invalid options before anything is loaded, and set the default of --task."""
    if args.task is None:
        args.task = "words" if only_bundled(args.model) else "passkey"
    if not args.model and args.task != "words":
        raise InputError(
            f"No model for --task {args.task}. Give --model, or use --task words with the bundled "
            "models."
        )
    check_cache_options(args)
    for option in ("trials", "prefill_step_size"):
        check_least(args, option, 1)
    for length in args.lengths or ():
        if length < 2:
            raise InputError(f"--lengths must be at least 2 tokens, got {length}.")
    for depth in args.depths:
        if not 0 <= depth <= 1:
            raise InputError(f"--depths must be within 0..1, got {depth:g}.")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that affects the figures and is not in the rows."""
    cache = ("kv_bits", "kv_group_size", "quantized_kv_start") if args.kv_bits else ()
    # The step size affects a growing scale and the time at which keys are quantised.
    parts = ("prefill_step_size",) if args.scale == "grow" or args.kv_bits else ()
    return {name: getattr(args, name) for name in ("seed", "scale", *cache, *parts)}


def _measure(
    args: argparse.Namespace,
    results: Results,
    loader: Loader,
    candidate: Candidate,
    lengths: list[int],
) -> None:
    """Measure all cells of one model and print its table."""
    model, tokenizer = loader.load(candidate.path)
    label = candidate.label
    depths = sorted({round(float(depth), 4) for depth in args.depths})
    reader = Reader(
        model,
        tokenizer,
        grow=args.scale == "grow",
        prefill_step_size=args.prefill_step_size,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
    )
    row = {
        "task": args.task,
        "label": label,
        "trained_length": candidate.trained_length,
        "model": candidate.model,
    }
    # Deepest first: its filler before the fact is a prefix that all other depths share.
    cells = [
        {**row, "length": length, "depth": depth} for length in lengths for depth in depths[::-1]
    ]
    missing = [cell["length"] * (args.trials - _tried(results, cell)[0]) for cell in cells]
    with tqdm(total=sum(max(0, tokens) for tokens in missing), unit="tok", desc=label) as bar:
        for cell in cells:
            bar.set_postfix_str(f"{cell['length']} tokens, depth {cell['depth']:g}")
            _fill_cell(args, results, cell, reader, bar)
    _print_table(args.task, label, results, model, lengths, depths)


def _lengths(args: argparse.Namespace, model: nn.Module, label: str) -> list[int]:
    """Return the lengths to measure, shortest first."""
    if not args.lengths:
        return default_lengths(model, label, bundled=only_bundled(args.model))
    lengths = sorted(set(args.lengths))
    scaled(model).check_length(lengths[-1], "The longest of --lengths")
    return lengths


def _tried(results: Results, cell: dict[str, Any]) -> tuple[int, int]:
    """Return the number of trials of a cell so far and the number of correct answers."""
    row = results.find(**{key: cell[key] for key in _KEYS}) or {}
    return row.get("trials", 0), row.get("correct", 0)


def _fill_cell(
    args: argparse.Namespace, results: Results, cell: dict[str, Any], reader: Reader, bar: Any
) -> None:
    task, length, depth = TASKS[args.task], cell["length"], cell["depth"]
    start, correct = _tried(results, cell)
    for trial in range(start, args.trials):
        # One generator for each trial, so that a later run may continue or extend the grid.
        rng = np.random.default_rng([args.seed, length, round(depth * 10_000), trial])
        room = length - task.answer_tokens
        try:
            prompt, fact = task.draw(rng, reader.tokenizer, room, depth)
        except ValueError as error:
            raise InputError(
                f"A length of {length} is too short for --task {args.task}: {error} and "
                f"{task.answer_tokens} for the answer. Give longer --lengths."
            ) from error
        progress = advancing(bar)
        reply = reader.answer(prompt, task.answer_tokens, progress)
        progress(length)
        correct += task.found(reply, fact)
        tried = trial + 1
        results.add({**cell, "trials": tried, "correct": correct, "accuracy": correct / tried})


def _print_table(
    task: str,
    label: str,
    results: Results,
    model: nn.Module,
    lengths: list[int],
    depths: list[float],
) -> None:
    print(f"Task {task}, {label}: share of facts found, by depth.")
    heads = [*(f"{depth:.0%}" for depth in depths), "all", "trials"]
    print(f"{'tokens':>8} {'scale':>7}" + "".join(f" {head:>7}" for head in heads))
    for length in lengths:
        keys = {"task": task, "label": label, "length": length}
        cells = [_tried(results, {**keys, "depth": depth}) for depth in depths]
        scale = scaled(model).scale_at(length)
        trials = sum(tried for tried, _ in cells)
        shares = [correct / tried for tried, correct in cells]
        shares.append(sum(correct for _, correct in cells) / trials)
        cols = "".join(f" {share:>7.2f}" for share in shares)
        print(f"{length:>8} {scale:>7g}{cols} {trials:>7}")


main = command(
    "passkey", add_arguments, run, "--model my-model --lengths 4096 16384 --output passkey"
)


if __name__ == "__main__":
    sys.exit(main())
