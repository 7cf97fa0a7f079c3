"""What `crash.py` kills while it writes: conversion, fusing, training, caches, results."""

import json
import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from .case import read_safetensors
from .sandbox import Outcome, Run, Sandbox, command

_SMALL = 100_000  # bytes


class Scene(ABC):
    """Something that is killed while it writes."""

    name: str
    size: int | None = _SMALL  # of the largest file, less than it needs; None: its files are small

    def __init__(self, sandbox: Sandbox) -> None:
        """Run once without a kill, to know the result and the time."""
        self.sandbox = sandbox
        self.box = sandbox.root / f"{self.name}-whole"
        self.box.mkdir()
        outcome = self.start(self.box).wait()
        if outcome.status != 0:
            ended = f"status {outcome.status} after {outcome.seconds:.0f} s"
            sys.exit(f"{self.name} fails when nobody kills it, {ended}: {outcome.err[-2000:]}")
        self.seconds = outcome.seconds
        self.whole = self.result(self.box)
        assert self.whole is not None

    @abstractmethod
    def argv(self, box: Path) -> list[str]:
        """Return the command, the same for every start in a box."""

    @abstractmethod
    def result(self, box: Path) -> Any:
        """Return what was made, to compare, or None where nothing was."""

    def lost(self, box: Path, before: Any) -> list[str]:
        """Return what a kill lost, given the result before it."""
        return []

    def run(self, *argv: str) -> Outcome:
        """Run another command in a box of its own."""
        return self.sandbox.run(argv, self.sandbox.root / "look")

    def start(self, box: Path) -> Run:
        """Start the command in a box."""
        return Run(command(self.argv(box)), box, self.sandbox, 120, network=True)

    def base(self, name: str) -> str:
        """Return the path of a whole folder."""
        return str(self.sandbox.bases / name)


def tree(folder: Path) -> dict[str, bytes] | None:
    """Return the files of a folder, or None where there is no folder."""
    if not folder.is_dir():
        return None
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Conversion(Scene):
    """A conversion into a new folder."""

    name = "conversion"

    def argv(self, box: Path) -> list[str]:
        return ["convert", "--hf-path", self.base("bins"), "--mlx-path", str(box / "written")]

    def result(self, box: Path) -> Any:
        return tree(box / "written")

    def lost(self, box: Path, before: Any) -> list[str]:
        now = self.result(box)
        return [] if now in (None, self.whole) else ["a folder that is not whole has the name"]


class Fusing(Conversion):
    """Adapters that are merged into a new folder."""

    name = "fuse"

    def argv(self, box: Path) -> list[str]:
        adapters = self.sandbox.bases / "adapters"
        if not adapters.is_dir():

            def make() -> None:
                from ..conftest import random_adapters

                random_adapters(self.sandbox.bases / "ours", adapters, 1)

            Run(make, self.sandbox.root / "adapting", self.sandbox, 120).wait()
        options = ["--adapter-path", str(adapters), "--save-path", str(box / "written")]
        return ["fuse", "--model", self.base("ours"), *options]


class Training(Scene):
    """A run of training that saves at every iteration, and is resumed."""

    name = "training"
    size = None

    def argv(self, box: Path) -> list[str]:
        run = ["--iters", "8", "--save-every", "1", "--steps-per-eval", "100", "--val-batches", "1"]
        run += ["--batch-size", "1", "--max-seq-length", "32", "--num-layers", "1", "--resume"]
        data = ["--data", self.base("data"), "--adapter-path", str(box / "adapters")]
        return ["lora", "--model", self.base("ours"), "--train", *run, *data]

    def result(self, box: Path) -> Any:
        current = (box / "adapters" / "current").resolve()
        if not (current / "state.json").is_file():
            return None
        tensors, _ = read_safetensors(current / "adapters.safetensors")
        return int(current.name), tensors

    def lost(self, box: Path, before: Any) -> list[str]:
        now = self.result(box)
        if before is not None and (now is None or now[0] < before[0]):
            return [f"save {before[0]} is lost: {now and now[0]}"]
        if now is None:
            return []
        options = ("--prompt", "hi", "--max-tokens", "1")
        adapters = ("--adapter-path", str(box / "adapters"))
        outcome = self.run("generate", "--model", self.base("ours"), *adapters, *options)
        return [] if outcome.status == 0 else [f"save {now[0]} does not open: {outcome.message}"]


class PromptCache(Scene):
    """A prompt cache that replaces another."""

    name = "prompt cache"

    def argv(self, box: Path) -> list[str]:
        file = box / "cache.safetensors"
        if not file.exists():
            shutil.copy(self.sandbox.bases / "cache" / "cache.safetensors", file)
        text = ["--prompt-file", self.base("prompt/prompt.txt"), "--prompt-cache-file", str(file)]
        return ["cache_prompt", "--model", self.base("ours"), *text]

    def result(self, box: Path) -> Any:
        return (box / "cache.safetensors").read_bytes()

    def lost(self, box: Path, before: Any) -> list[str]:
        file = ("--prompt-cache-file", str(box / "cache.safetensors"))
        outcome = self.run("generate", *file, "--prompt", "hi", "--max-tokens", "1")
        return [] if outcome.status == 0 else [f"the cache does not open: {outcome.message}"]


class ResultFiles(Scene):
    """Perplexities, a row at a time."""

    name = "results"
    size = None

    def argv(self, box: Path) -> list[str]:
        lengths = ["--lengths", "8", "12", "16", "24", "32", "48", "64", "--windows", "5"]
        options = ["--data", self.base("text.txt"), "--output", str(box / "results")]
        return [
            "perplexity",
            "--model",
            self.base("ours"),
            "--protocol",
            "whole",
            *options,
            *lengths,
        ]

    def result(self, box: Path) -> Any:
        file = box / "results.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        return sorted(rows, key=lambda row: row["length"]) or None

    def lost(self, box: Path, before: Any) -> list[str]:
        gone = [row for row in before or [] if row not in (self.result(box) or [])]
        return [f"{len(gone)} rows are lost"] if gone else []


class HubCache(Scene):
    """The first use of a published checkpoint: a download and a conversion."""

    name = "hub cache"

    def argv(self, box: Path) -> list[str]:
        return ["generate", "--model", "someone/clex", "--prompt", "hi", "--max-tokens", "2"]

    def start(self, box: Path) -> Run:
        if not (box / "home").exists():  # downloads are outside of the box
            shutil.rmtree(self.sandbox.root / "hub", ignore_errors=True)
        return super().start(box)

    def result(self, box: Path) -> Any:
        out = (box / "stdout.txt").read_text()
        return out.split("==========")[1] if out.count("==========") == 2 else None


SCENES: tuple[type[Scene], ...] = (Conversion, Fusing, Training, PromptCache, ResultFiles, HubCache)
