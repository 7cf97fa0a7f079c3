"""The whole folders that hostile cases begin as, made by the commands themselves."""

import json
import shutil
import sys
from pathlib import Path

from .case import Case
from .cases_data import whole_run
from .sandbox import Run, Sandbox

_GOLDEN = Path(__file__).parents[1] / "golden"
_BASES = {
    "generate": "ours",
    "convert": "ours",
    "freeze": "ours",
    "freeze-gguf": "ours",
    "doctor": "ours",
    "chat": "ours",
    "frequencies": "ours",
    "measure": "ours",
    "gguf": "gguf",
    "gguf-convert": "gguf",
    "gguf-doctor": "gguf",
    "adapters": "adapters",
    "fuse": "adapters",
    "cache": "cache",
    "cache-alone": "cache",
    "restore": "talk",
    "picture": "results",
    "log": "saves",
    "go-on": "results",
    "yaml": "",
    "train": "data",
    "resume": "saves",
    "text": "data",
    "prompt": "prompt",
    "fill-cache": "prompt",
}
_SENTENCE = "The quick brown fox jumps over the lazy dog near the river. "


def valid_case(command: str) -> Case:
    """Return a case that is not broken, for what a command takes and answers."""
    base = _BASES[command]
    edit = whole_run() if command == "yaml" else lambda _: None
    if command == "restore":  # a conversation that stays as it is after a failure
        base, edit = "", lambda _: None
    return Case("valid", command, base, edit, (command,), 0)


def make_bases(sandbox: Sandbox, *, every: bool = True) -> None:
    """Make the folders in `sandbox.bases`.

    Args:
        sandbox: whose folder they are put in.
        every: all of them; otherwise the model, its source, the texts and a prompt cache.
    """
    bases, box = sandbox.bases, sandbox.root / "making"
    ours = str(bases / "ours")
    for name, golden in (("published", "clex_llama_gqa_log_scale"), ("bins", "clex_llama")):
        ignore = shutil.ignore_patterns("golden.*")
        shutil.copytree(_GOLDEN / golden, bases / name, ignore=ignore)
    for name in ("data", "prompt", "cache", "talk", "results"):
        (bases / name).mkdir()
    rows = "".join(json.dumps({"text": f"{n}. {_SENTENCE * 8}"}) + "\n" for n in range(8))
    for name in ("train", "valid", "test"):
        (bases / "data" / f"{name}.jsonl").write_text(rows)
    (bases / "text.txt").write_text(_SENTENCE * 200)
    (bases / "prompt" / "prompt.txt").write_text(_SENTENCE)

    def make(*argv: str, stdin: str = "") -> None:
        outcome = sandbox.run(argv, box, stdin=stdin, seconds=120)
        if outcome.status != 0:
            ended = f"status {outcome.status} after {outcome.seconds:.0f} s"
            sys.exit(f"{argv} fails, {ended}: {outcome.err[-2000:]}")

    def convert(source: str, name: str, *options: str) -> None:
        make("convert", "--hf-path", str(bases / source), "--mlx-path", str(bases / name), *options)

    convert("bins", "ours", "--dtype", "float32")
    cache = str(bases / "cache" / "cache.safetensors")
    make("cache_prompt", "--model", ours, "--prompt", "hi", "--prompt-cache-file", cache)
    if not every:
        return
    for work in (lambda: _stock(box, bases), lambda: _adapters(bases), lambda: _gguf(bases)):
        outcome = Run(work, box, sandbox, 120).wait()
        if outcome.status != 0:
            sys.exit(outcome.err[-2000:])
    convert("stock", "yarn", "--scaling", "yarn", "--factor", "4")
    talk = bases / "talk" / "talk.safetensors"
    make("chat", "--model", ours, "--max-tokens", "2", stdin=f"hi\n/save {talk}\n")
    text, prefix = str(bases / "text.txt"), str(bases / "results" / "results")
    measure = ("--data", text, "--lengths", "32", "--windows", "5", "--output", prefix)
    make("perplexity", "--model", ours, *measure)
    run = ("--batch-size", "1", "--max-seq-length", "32", "--num-layers", "1", "--iters", "1")
    saves = ("--data", str(bases / "data"), "--val-batches", "1")
    make("lora", "--model", ours, "--train", *run, *saves, "--adapter-path", str(bases / "saves"))


def _stock(box: Path, bases: Path) -> None:
    from ..conftest import stock_folder

    folder = stock_folder(box, _GOLDEN / "clex_llama")
    shutil.move(folder, bases / "stock")


def _adapters(bases: Path) -> None:
    from ..conftest import random_adapters

    random_adapters(bases / "ours", bases / "adapters", 1)


def _gguf(bases: Path) -> None:
    from ..convert.read.test_gguf_file import tiny_gguf

    (bases / "gguf").mkdir()
    path, _ = tiny_gguf(bases / "gguf")
    path.rename(path.with_name("model.gguf"))
