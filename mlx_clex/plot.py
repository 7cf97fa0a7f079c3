"""Command: pictures of result files, of a training run, and of a model's frequencies.

Not covered: measuring; the commands that measure draw their results as well.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from .bundled import PREFIX
from .checkpoint.files import check_link, read_json
from .commands.help import Formatter
from .commands.options import add_shared
from .commands.run_command import command
from .errors import InputError
from .evaluation.candidates import labels_of
from .evaluation.results import Results, read_results
from .loading import load_scaling
from .pictures.draw import draw
from .pictures.frequencies import draw_frequencies
from .pictures.style import check_path
from .pictures.training import draw_training
from .training.log import LOG, read_log

# Pictures of result files: the kind of the results, and what --help says.
_OF_RESULTS = {
    "extrapolation": ("perplexity", "Perplexity by length, from mlx_clex perplexity."),
    "passkey": ("passkey", "Facts found by length and depth, from mlx_clex passkey."),
    "compare": ("compare", "Two models on one text by position, from mlx_clex compare."),
}
_EXAMPLES = {
    "extrapolation": "extrapolation perplexity.json --output perplexity.svg",
    "passkey": "passkey passkey.json",
    "compare": "compare compare.json",
    "frequencies": "frequencies --model my-model --max-scale 8",
    "training": "training adapters",
}


# Settings that must be equal in files drawn together: which tokens count, with which context.
_SAME = ("protocol", "tokens", "targets", "texts", "windows", "longest", "chunk", "stride")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each picture."""
    which = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return which.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=Formatter,
            epilog=f"example:\n  mlx_clex plot {_EXAMPLES[name]}",
        )

    for name, (_, text) in _OF_RESULTS.items():
        several = " Several files are drawn together." if name != "compare" else ""
        add(name, text).add_argument(
            "file",
            nargs="+" if several else 1,
            type=Path,
            metavar="FILE",
            help=f"PREFIX.json, as --output PREFIX of the command wrote it.{several}",
        )
    frequencies = add("frequencies", "Frequencies of models / those of NTK-aware scaling.")
    frequencies.add_argument(
        "--model",
        required=True,
        nargs="+",
        help="Folders, .gguf files or Hugging Face ids of models with a scaling. Required.",
    )
    add_shared(frequencies, "--adapter-path")
    frequencies.add_argument(
        "--max-scale",
        type=float,
        metavar="NUMBER",
        help="The largest scale to draw, target length / trained length. Default: the "
        "largest that the scaling was set up for (max_factor, factor), or 16 where that is 1.",
    )
    training = add("training", "Loss and perplexity by iteration, from mlx_clex lora.")
    training.add_argument(
        "log", type=Path, help=f"The --adapter-path of a run, or the {LOG} in it."
    )
    for name, parser_of_one in which.choices.items():
        default = "frequencies.png" if name == "frequencies" else "the input's name, as .png"
        parser_of_one.add_argument(
            "--output",
            type=Path,
            metavar="FILE",
            help=f"The picture to write, .png or .svg. Default: {default}.",
        )


def run(args: argparse.Namespace) -> None:
    """Draw one picture.

    Raises:
        InputError: a file or model that cannot be drawn, or matplotlib is missing.
    """
    path = args.output or _default_path(args)
    check_path(path)
    if args.picture == "frequencies":
        _frequencies(args, path)
    elif args.picture == "training":
        draw_training(_log(args.log), path, _title(args.log))
    else:
        kind, _ = _OF_RESULTS[args.picture]
        draw(_together({file: read_results(file, kind) for file in args.file}), path)
    print(f"Wrote {path}.")


def _default_path(args: argparse.Namespace) -> Path:
    if args.picture == "frequencies":
        return Path("frequencies.png")
    if args.picture == "training":
        return _log_file(args.log).with_suffix(".png")
    return Path(f"{str(args.file[0]).removesuffix('.json')}.png")


def _frequencies(args: argparse.Namespace, path: Path) -> None:
    if args.max_scale is not None and not 1 < args.max_scale < float("inf"):
        raise InputError(f"--max-scale must be greater than 1, got {args.max_scale:g}.")
    scalings = {
        name: load_scaling(model, args.adapter_path)
        for name, model in labels_of(args.model, args.adapter_path).items()
    }
    draw_frequencies(scalings, path, args.max_scale)


def _log_file(path: Path) -> Path:
    return path / LOG if path.is_dir() else path


def _log(path: Path) -> list[dict[str, Any]]:
    file = _log_file(path)
    if not file.is_file():
        raise InputError(f"{file} is not there: give the --adapter-path of a mlx_clex lora run.")
    return read_log(file)


def _title(path: Path) -> str:
    """Name the data and the model of a run, from the settings beside its log."""
    file = _log_file(path)
    settings = file.with_name("adapter_config.json")
    check_link(settings, file.parent)
    run = read_json(settings) if settings.is_file() else {}
    if not isinstance(run, dict) or not {"data", "model"} <= run.keys():
        return f"Training run {file.parent.name or file}"
    scaling = (run.get("rope_scaling") or {}).get("type")
    method = f" with {scaling} scaling" if scaling else ""
    return f"{run['data']}: training of {Path(str(run['model'])).name.removeprefix(PREFIX)}{method}"


def _together(results: dict[Path, Results]) -> Results:
    """Join results; a label that more than one file has gets the file's name.

    Raises:
        InputError: they are of other tokens, or with other contexts, and do not compare.
    """
    for name in _SAME:
        values = {str(one.settings.get(name)): file for file, one in results.items()}
        if len(values) > 1:
            told = ", ".join(f"{value} in {file}" for value, file in values.items())
            raise InputError(
                f"The files differ in their {name} ({told}), so their figures do not compare. "
                "Draw each file in a picture of its own."
            )
    stems = Counter(file.stem for file in results)
    names = {file: file.stem if stems[file.stem] == 1 else str(file) for file in results}
    labels = ({row.get("label") for row in one.rows} for one in results.values())
    files = Counter(label for its in labels for label in its)
    rows = [
        {**row, "label": f"{row['label']} ({names[file]})"} if files[row.get("label")] > 1 else row
        for file, one in results.items()
        for row in one.rows
    ]
    return dataclasses.replace(next(iter(results.values())), rows=rows)


main = command("plot", add_arguments, run, _EXAMPLES["extrapolation"])


if __name__ == "__main__":
    sys.exit(main())
