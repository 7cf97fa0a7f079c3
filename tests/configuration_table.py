"""What mlx_clex does with each published configuration: the second table of docs/families.md.

Each column is one leg of a user's way: load, put on a scaling, convert, fine-tune, merge. A leg
that is refused is listed with the first words of the reason.

Not covered: real weights. The models are `published_configs.scaled`, random and narrow.
"""

import contextlib
import functools
import io
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_clex.convert import convert
from mlx_lm import generate
from mlx_lm.utils import load_model

from mlx_clex import attach, fuse, load, lora
from mlx_clex.checkpoint.config import normalise_config
from mlx_clex.diagnosis.model_report import report
from mlx_clex.errors import InputError
from mlx_clex.model_file import Model, ModelArgs

from .published_configs import CONFIGS, LENGTH, VOCABULARY, published, scaled, tiny_folder
from .published_configs import text_config as text_of

HEAD = """
## Published configurations

{all} published configurations, each with the rope, lengths, heads and layer pattern of its
config.json, and random weights in narrow widths. {served} pass every column.
`tests/test_configurations.py` holds each cell.

- **loads**: `load` reads the folder and its tokenizer, and gives the logits of stock mlx-lm,
  which is given the defaults of transformers for missing keys.
- **clex**, **gene**, **yarn**: `attach` at scale 1 leaves the logits as they were.
- **convert**: `convert --scaling clex`, load with the tokenizer, generate.
- **lora, fuse**: two steps of `lora --scaling clex`, `fuse`, and the same logits again. The tests
  train one checkpoint of each family, and with MLX_CLEX_TRAIN_ALL=1 every one, as on 2026-11-29.
- **doctor**: describes the folder and finds nothing that would fail.
- hunyuan-7b has `use_qk_norm`: its keys are normalised after they are rotated, so they cannot move
  to a new scale. The tiny model of its family in the first table has no such norm.
"""

METHODS = ("clex", "gene", "yarn")
COLUMNS = ("loads", "clex", "gene", "yarn", "convert", "lora, fuse", "doctor")
RUNS = [name for name, entry in CONFIGS.items() if "mlx_lm_cannot" not in entry]
# Reasons of refusals, for the table; a part of the message of the error.
REASONS = {
    "only in layers with other caches": "rotary only in layers with a window",
    "No list of frequencies": "its dynamic rope has no fixed frequencies; drop it",
    "was found none": "no rotary attention",
    "found none": "no rotary attention",
    "has a rope but does not call it": "its rope is not used",
    "needs a fixed scale": "one fixed scale only",
}
_WINDOW = "rotary only in layers with a window"
_NONE = "no rotary attention"
_DYNAMIC = "its dynamic rope has no fixed frequencies; drop it"
_FIXED = "one fixed scale only"
_NO_SCALING = ("clex", "gene", "yarn", "convert", "lora, fuse", "doctor")
# What does not answer "yes"; the tests hold every cell.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "exaone-4.0-32b": dict.fromkeys(_NO_SCALING, _WINDOW),
    "tiny-aya-global": dict.fromkeys(_NO_SCALING, _WINDOW),
    "granite-4.0-h-350m": dict.fromkeys(_NO_SCALING, _NONE),
    "internlm2-chat-1.8b": dict.fromkeys(_NO_SCALING, _DYNAMIC),
    "internlm3-8b": dict.fromkeys(_NO_SCALING, _DYNAMIC),
    "hunyuan-7b": {"convert": _FIXED, "lora, fuse": _FIXED},
}
_BOUND = 2e-4  # of a logit; float32 rounding of angles


def _ids() -> mx.array:
    return mx.random.randint(3, VOCABULARY, (1, LENGTH), key=mx.random.key(0))


def attached(name: str, method: str) -> str:
    """Attach a method at scale 1; return "yes" where the model equals its source."""
    mx.random.seed(1)
    model = Model(ModelArgs.from_dict(scaled(name)))
    before = model(_ids())
    options = {"factor": 1.0} if method == "yarn" else {}
    attach(model, {"type": method, **options}, scale=1.0)
    error = float(mx.abs(model(_ids()) - before).max() / mx.maximum(1, mx.abs(before).max()))
    return "yes" if error < _BOUND else f"off by {error:.1e}"


def loads(folder: Path) -> str:
    """Load a folder as published, with its tokenizer; return "yes" for stock mlx-lm's logits."""
    model, tokenizer = load(folder)
    assert tokenizer.encode("text")
    config = json.loads((folder / "config.json").read_text())
    # Where a key is missing, transformers' default counts, which may differ from mlx-lm's.
    # The output head is that of the file.
    known = config.keys() | {"tie_word_embeddings"}
    absent = {k: v for k, v in normalise_config(config).items() if k not in known}
    stock, _ = load_model(folder, model_config=absent)
    error = float(mx.abs(model(_ids()) - stock(_ids())).max())
    return "yes" if error == 0 else f"off by {error:.1e}"


def converted(folder: Path, target: Path) -> str:
    """Convert with a scaling, load with the tokenizer, and generate."""
    convert(folder, target, scaling={"type": "clex"})
    model, tokenizer = load(target)
    generate(model, tokenizer, "text of any kind", max_tokens=2)
    return "yes"


def tuned(folder: Path, target: Path) -> str:
    """Train for two steps, merge, and load the result."""
    texts = target / "texts"
    texts.mkdir(parents=True)
    (texts / "a.txt").write_text("the quick brown fox runs away . " * 20)
    steps = "--train --scaling clex --iters 2 --batch-size 1 --max-seq-length 16 --val-batches 0"
    where = ["--model", str(folder), "--adapter-path", str(target / "adapters")]
    _call(lora, *steps.split(), *where, "--data", str(texts))
    _call(fuse, *where, "--save-path", str(target / "fused"))
    adapters, _ = load(folder, adapter_path=target / "adapters")
    merged, _ = load(target / "fused")
    error = float(mx.abs(adapters(_ids()) - merged(_ids())).max())
    return "yes" if error < 1e-3 else f"off by {error:.1e}"


def told(folder: Path) -> str:
    """Describe the folder; return "yes" where nothing is wrong."""
    rows = report(str(folder))
    notes = [text for name, text in rows if name == "problem" and "mlx-lm" not in text]
    assert any(name == "family" for name, _ in rows), rows
    return _reason("; ".join(notes)) if notes else "yes"


def _call(command: Any, *argv: str) -> None:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        status = command.main(argv)
    if status:
        raise InputError(errors.getvalue().splitlines()[-1])


def row(name: str, scratch: Path, *, train: bool = True) -> dict[str, str]:
    """Return what happened in each leg: "yes", or why not.

    Args:
        name: a key of `CONFIGS`.
        scratch: an empty folder.
        train: run the leg that trains as well.
    """
    folder = tiny_folder(name, scratch / "source")
    legs: dict[str, Callable[[], str]] = {
        "loads": lambda: loads(folder),
        **{method: functools.partial(attached, name, method) for method in METHODS},
        "convert": lambda: converted(folder, scratch / "converted"),
        "lora, fuse": lambda: tuned(folder, scratch / "tuned"),
        "doctor": lambda: told(folder),
    }
    if not train:
        del legs["lora, fuse"]
    found = {}
    for column, leg in legs.items():
        try:
            found[column] = leg()
        except InputError as error:
            found[column] = _reason(str(error))
    return found


def _reason(message: str) -> str:
    return next((short for part, short in REASONS.items() if part in message), message)


def expected(name: str) -> dict[str, str]:
    """Return the row of a configuration in the table."""
    return {column: EXCEPTIONS.get(name, {}).get(column, "yes") for column in COLUMNS}


def table() -> str:
    """Return the section of docs/families.md, as Markdown."""
    served = sum(name not in EXCEPTIONS for name in RUNS)
    lines = [HEAD.format(all=len(CONFIGS), served=served)]
    lines.append(f"| checkpoint | family | rope | {' | '.join(COLUMNS)} |")
    lines.append("|---|---|---|" + "---|" * len(COLUMNS))
    notes: list[str] = []
    for name in RUNS:
        cells = []
        for cell in expected(name).values():
            if cell != "yes" and cell not in notes:
                notes.append(cell)
            cells.append("yes" if cell == "yes" else f"no ({notes.index(cell) + 1})")
        family = text_of(published(name))["model_type"]
        lines.append(f"| {name} | {family} | {rope_of(name)} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    lines += [
        "",
        "No copy confirms these fields of a config.json (`unverified` in",
        "`tests/data/configs.json`):",
        "",
    ]
    for name in CONFIGS:
        if fields := CONFIGS[name].get("unverified"):
            lines += textwrap.wrap(f"- {name}: {', '.join(fields)}", 100, subsequent_indent="  ")
    lines += ["", "mlx-lm itself cannot build these:", ""]
    for name in sorted(CONFIGS.keys() - set(RUNS)):
        lines.append(f"- {name}: {CONFIGS[name]['mlx_lm_cannot'].partition(': ')[2]}")
    return "\n".join(lines) + "\n"


def summary(outcomes: Mapping[str, set[str]]) -> list[str]:
    """Lines for the end of a test run, from what happened to the test of each configuration."""
    groups: dict[str, list[str]] = {}
    for name, seen in outcomes.items():
        reason = next(iter(EXCEPTIONS.get(name, {}).values()), "")
        groups.setdefault(reason if seen == {"passed"} else "FAILED", []).append(name)
    lines = [f"{len(groups.pop('', [])):4} pass every column"] if groups else []
    lines += [f"{len(names):4} {how}: {', '.join(names)}" for how, names in groups.items()]
    return ["published configurations", *lines] if lines else []


def rope_of(name: str) -> str:
    """Return the type of the rope in a config."""
    text = text_of(published(name))
    entry = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = entry.get("type") or entry.get("rope_type") or "plain"
    return "plain" if kind == "default" else re.sub("_", " ", kind)


if __name__ == "__main__":
    import sys
    import tempfile
    import time

    mx.disable_compile()
    for each in sys.argv[1:] or RUNS:
        start = time.time()
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
            answer = row(each, Path(place))
        print(f"{time.time() - start:.1f} {each} {json.dumps(answer)}", flush=True)
