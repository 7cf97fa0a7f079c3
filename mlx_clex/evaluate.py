"""Command: score a model on LongBench, RULER, InfiniteBench and other lm-eval tasks.

lm-evaluation-harness supplies tasks, prompts and scores. Each prompt is read at the scale of
its own length, as in `generate`. If prompts are cut, the command prints how many. With
--output each answer is stored at once in PREFIX.answers-*.db, and the next run reuses it.

Not covered: what `evaluation/harness.py` does not cover.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .checkpoint.files import read_json
from .checkpoint.fingerprint import fingerprint, short
from .checkpoint.folder import read_config
from .commands.help import point_elsewhere
from .commands.options import add_shared, check_least, loading_options
from .commands.run_command import command
from .errors import InputError, say
from .evaluation.results import Results, alone, open_results, read_results
from .evaluation.ruler import RULER_THRESHOLD, effective_length, ruler_tasks
from .loading import load, resolve
from .model.scaled_model import scaled

_RULER_TASKS = 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_shared(parser, "--model", "--adapter-path", "--trust-remote-code")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Tasks, groups or tags of lm-evaluation-harness: longbench, longbench2, ruler, "
        "infinitebench, niah_single_1 and others. Default: none, for --effective-length of "
        "--output.",
    )
    parser.add_argument(
        "--include-path",
        type=Path,
        metavar="FOLDER",
        help="Folder with your own task files. Default: none.",
    )
    parser.add_argument(
        "--metadata",
        default="{}",
        metavar="JSON",
        help="JSON object passed to the tasks, for RULER e.g. '{\"max_seq_lengths\": [4096]}'.",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="Largest number of documents for each task; in RULER, for each length. Default: all.",
    )
    parser.add_argument(
        "--num-shots",
        "--num-fewshot",
        type=int,
        help="Examples in a prompt. Default: the task's own number.",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="Upper bound of prompt and answer together. A longer prompt loses its middle, as in "
        "LongBench. Default: the reach if the model refuses longer texts (CLEX), else none.",
    )
    add_shared(
        parser,
        "--scale",
        metavar="prompt|NUMBER",
        help="prompt (default): each request uses the scale of its whole length. NUMBER: a fixed "
        "scale.",
    )
    parser.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Render prompts as user messages with the chat template. Default: on if the model has "
        "one.",
    )
    parser.add_argument(
        "--chat-template-args",
        default="{}",
        metavar="JSON",
        help="JSON object of chat template settings, e.g. '{\"enable_thinking\": false}'.",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="Run tasks that execute code written by the model.",
    )
    parser.add_argument(
        "--effective-length",
        action="store_true",
        help="Report RULER's effective context length. Without --tasks, use the results in "
        "--output.",
    )
    add_shared(parser, "--output", help="Write PREFIX.json and PREFIX.csv, or add to them.")
    greedy = "Answers are greedy. Leave it out."
    point_elsewhere(
        parser,
        {
            "--output-dir": "Use --output PREFIX, for example --output DIR/scores.",
            "--batch-size": "Requests are read one by one, each at its own scale. Leave it out.",
            "--max-tokens": "Each task sets the length of its answers. Leave it out.",
            "--fewshot-as-multiturn": "All examples are in one message. Leave it out.",
            **dict.fromkeys(("--seed", "--temp", "--top-p", "--top-k"), greedy),
        },
    )


def run(args: argparse.Namespace) -> None:
    """Run the tasks and print a table of scores.

    Raises:
        InputError: an option, a task, its data or the model cannot be used.
        RunError: MLX failed.
    """
    _check(args)
    if args.tasks:
        with alone(args.output):
            results = _evaluate(args)
    else:
        results = read_results(args.output, "evaluate")
    if args.effective_length:
        _report_effective_length(results)


def _check(args: argparse.Namespace) -> None:
    """Refuse invalid options before anything is loaded; parse the JSON objects."""
    if not args.tasks and not (args.effective_length and args.output):
        raise InputError("No task. Give --tasks, for example longbench or ruler.")
    if args.tasks and args.model is None:
        raise InputError("No model. Give a folder, a .gguf file or a Hugging Face id as --model.")
    if args.scale == "grow":
        raise InputError("--scale grow is not allowed here. Use --scale prompt or a number.")
    for option, least in (("limit", 1), ("num_shots", 0), ("max_length", 2)):
        check_least(args, option, least)
    if args.include_path is not None and not args.include_path.is_dir():
        raise InputError(f"--include-path {args.include_path} is not a folder.")
    for option in ("metadata", "chat_template_args"):
        setattr(args, option, _json_object(args, option))
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError("The tasks need lm-eval: pip install 'mlx-clex[evaluate]'.")


def _json_object(args: argparse.Namespace, key: str) -> dict[str, Any]:
    """Return the value of an option that takes a JSON object."""
    option, text = f"--{key.replace('_', '-')}", getattr(args, key)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{option} is not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise InputError(f"{option} must be a JSON object, got {text}.")
    return value


def _evaluate(args: argparse.Namespace) -> Results:
    # Imported here: it takes seconds and needs the extra `evaluate`.
    from .evaluation.harness import PlannedLM, run_tasks
    from .evaluation.harness_tasks import load_tasks

    folder, metadata = resolve(args.model), args.metadata
    tasks = load_tasks(args.tasks, {**_tokenizer_of(folder, args), **metadata}, args.include_path)
    if args.effective_length:
        _check_lengths_of(tasks)
    model, tokenizer = load(folder, **loading_options(args))
    templated = args.apply_chat_template
    if templated is None:
        templated = tokenizer.has_chat_template
    elif templated and not tokenizer.has_chat_template:
        raise InputError(f"{args.model} has no chat template. Leave out --apply-chat-template.")
    max_length = args.max_length or scaled(model).limit
    scaled(model).check_length(args.max_length or 0, "--max-length")
    _check_made_lengths(tasks, max_length)
    results = open_results(
        args.output,
        kind="evaluate",
        settings={
            "limit": args.limit,
            "num_shots": args.num_shots,
            "scale": args.scale,
            "max_length": max_length,
            "chat_template": templated,
            "chat_template_args": args.chat_template_args,
            # Lengths are in the rows, so a later run may add more of them.
            "metadata": {key: metadata[key] for key in metadata if key != "max_seq_lengths"},
            "lm_eval": version("lm_eval"),
        },
        keys=("label", "task", "metric"),
    )
    label = Path(args.model).name or args.model
    if args.adapter_path:
        label = f"{label} + {Path(args.adapter_path).name}"
    same = {"label": label, "model": short(fingerprint(model, folder, args.adapter_path))}
    results.check_model(label, same["model"])
    lm = PlannedLM(
        model,
        tokenizer,
        use_chat_template=templated,
        chat_template_args=args.chat_template_args,
        max_length=max_length,
    )
    answers = results.path(
        f".answers-{short({'label': label, 'digest': same['model'], **results.settings})[:8]}"
    )
    for name in args.tasks:
        rows = run_tasks(
            lm,
            tasks[name],
            num_fewshot=args.num_shots,
            limit=args.limit,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            answers=answers,
        )
        for row in rows:
            results.add({**same, **row})
        _print_table(rows, first=name == args.tasks[0])
    if lm.cut:
        say(
            f"{lm.cut} of {lm.prompts} new prompts were longer than {max_length} tokens "
            "(--max-length) and lost their middle."
        )
    return results


def _check_lengths_of(tasks: Mapping[str, Any]) -> None:
    """Refuse --effective-length if no task has documents of several lengths."""
    by_length = (found for each in tasks.values() for found in each.documents(1).values())
    if not any("" not in found for found in by_length):
        raise InputError(
            f"--effective-length needs a task of RULER, and --tasks {' '.join(tasks)} has none. "
            "Leave it out."
        )


def _check_made_lengths(tasks: Mapping[str, Any], max_length: int | None) -> None:
    """Refuse documents that are longer than `max_length`.

    A document of RULER without its middle may have lost the answer.
    """
    made = (found for each in tasks.values() for found in each.documents(1).values())
    longest = max((int(length) for found in made for length in found if length), default=0)
    if max_length is not None and longest > max_length:
        raise InputError(
            f"--tasks {' '.join(tasks)} makes documents of {longest} tokens, but the longest "
            f"length is {max_length}. Name shorter ones, as in --metadata "
            f"'{{\"max_seq_lengths\": [{max_length}]}}', or raise --max-length up to the model's "
            "reach."
        )


def _tokenizer_of(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """Return the metadata entry with the tokenizer, for tasks that generate their documents."""
    file = folder / "tokenizer_config.json"
    runs_code = "auto_map" in read_config(folder) | (read_json(file) if file.is_file() else {})
    # The harness always runs a tokenizer's own code.
    return {} if runs_code and not args.trust_remote_code else {"tokenizer": str(folder)}


def _print_table(rows: Sequence[dict[str, Any]], *, first: bool) -> None:
    if first:
        print(f"{'task':<36} {'metric':<20} {'value':>8} {'stderr':>8} {'samples':>8}")
    for row in rows:
        stderr = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        samples = "" if row["samples"] is None else row["samples"]
        print(
            f"{row['task']:<36} {row['metric']:<20} {row['value']:>8.4f} {stderr:>8} {samples:>8}",
            flush=True,
        )


def _report_effective_length(results: Results) -> None:
    found = {
        label: effective_length(results, label)
        for label in dict.fromkeys(row["label"] for row in results.rows)
    }
    if not any(means for means, _ in found.values()):
        raise InputError(
            "--effective-length needs a task of RULER with results at all lengths; there is none. "
            "Run --tasks ruler with --metadata '{\"max_seq_lengths\": [4096, 8192]}'."
        )
    for label, (means, effective) in found.items():
        if not means:
            print(f"{label}: no task of RULER has results at all lengths")
            continue
        tasks = [
            task
            for task, scores in ruler_tasks(results, label).items()
            if len(scores) == len(means)
        ]
        print(f"{label}: " + ", ".join(f"{length}: {mean:.1%}" for length, mean in means.items()))
        told = "none of these lengths" if effective is None else f"{effective} tokens"
        print(
            f"Effective context length: {told} (above {RULER_THRESHOLD:.1%}, the score of "
            f"Llama-2-7B at 4,096 tokens; {len(tasks)} of RULER's {_RULER_TASKS} tasks)"
        )


main = command("evaluate", add_arguments, run, "--model my-model --tasks longbench --output scores")


if __name__ == "__main__":
    sys.exit(main())
