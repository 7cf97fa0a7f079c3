"""`make test-crash`: kills at random instants, full disks, read-only folders, two at once.

Afterwards everything opens, or the next run starts it anew; nothing that was saved is lost, and
what a run makes in the end is what it makes when nobody kills it.

Run it as `python -m tests.hostile.crash [--kills N]`.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .bases import make_bases
from .case import read_safetensors
from .sandbox import Outcome, Run, Sandbox, command, warm_up

_SMALL = 100_000  # bytes
_ROUNDS = 40  # kills of one folder before it must have been finished


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
            sys.exit(f"{self.name} fails when nobody kills it: {outcome.err[-2000:]}")
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


def _tree(folder: Path) -> dict[str, bytes] | None:
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
        return _tree(box / "written")

    def lost(self, box: Path, before: Any) -> list[str]:
        now = self.result(box)
        return [] if now in (None, self.whole) else ["a folder that is not whole has the name"]


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


def kill(scene: Scene, count: int, rng: random.Random) -> Iterator[str]:
    """Kill a scene this many times, and yield what was lost."""
    box, number, in_this = scene.box, 0, 0
    kills = finished = 0
    while kills < count:
        if in_this == 0:
            number += 1
            box = scene.sandbox.root / f"{scene.name}-{number}"
            box.mkdir()
        before = scene.result(box) if in_this else None
        run = scene.start(box)
        time.sleep(rng.uniform(0, scene.seconds))
        run.kill()
        outcome = run.wait()
        in_this += 1
        if outcome.status == -signal.SIGKILL:
            kills += 1
        elif outcome.status != 0:
            yield f"status {outcome.status} after a kill: {outcome.message[-2:]}"
        yield from scene.lost(box, before)
        if outcome.status == 0 or in_this > _ROUNDS or kills == count:
            yield from _finish(scene, box)
            finished += 1
            in_this = 0
    print(f"{scene.name:14}{kills:5} kills, {finished} finished afterwards", flush=True)


def _finish(scene: Scene, box: Path) -> Iterator[str]:
    """Let a killed scene come to its end, and compare the result."""
    # A whole folder has the name: nothing is left to do.
    if not (isinstance(scene, Conversion) and scene.result(box) is not None):
        outcome = scene.start(box).wait()
        if outcome.status != 0:
            yield f"cannot be finished: {outcome.message[-2:]}"
    if scene.result(box) != scene.whole:
        yield "another result than without kills"
    left = [str(path.relative_to(box)) for path in box.rglob("*incomplete*")]
    if left and not isinstance(scene, HubCache):
        yield f"left behind: {left}"
    shutil.rmtree(box)


def _told(outcome: Outcome) -> Iterator[str]:
    """Yield what is wrong with a command that had to fail."""
    if outcome.status not in (1, 2):
        yield f"status {outcome.status}: {outcome.message[-2:]}"
    elif len(outcome.message) != 1 or "Traceback" in outcome.err:
        yield f"{len(outcome.message)} lines: {outcome.message[-3:]}"


def full_disk(scene: Scene) -> Iterator[str]:
    """Yield what is lost when no file can grow beyond a size, or the disk has no room."""
    for kind in ("size of files", "disk") if scene.size else ("disk",):
        target, box = _two_folders(scene, "full")
        with (
            _mounted(target, "size=400k") if kind == "disk" else contextlib.nullcontext(True) as it
        ):
            if not it:
                print(f"{scene.name}: no small disk here (this needs root); left out")
                continue
            with contextlib.suppress(OSError):
                scene.argv(target)  # makes what is to be replaced
            before = _tree(target) or {}
            if kind == "disk":
                with contextlib.suppress(OSError), (target / "full").open("wb") as file:
                    file.write(b"x" * (1 << 20))
            outcome = _elsewhere(scene, target, box, scene.size if kind != "disk" else None).wait()
            yield from (f"full, {kind}: {fault}" for fault in _told(outcome))
            now = _tree(target) or {}
            if any(now.get(name) != data for name, data in before.items()):
                yield f"full, {kind}: what was there before is gone"
            if left := [name for name in now if "incomplete" in name and "hub" not in name]:
                yield f"full, {kind}: left behind: {left}"
        shutil.rmtree(target.parent)


def read_only(scene: Scene) -> Iterator[str]:
    """Yield what is wrong where the folder of the target cannot be written."""
    target, box = _two_folders(scene, "read-only")
    with _mounted(target, "size=10m") as fits:
        if not fits:
            print(f"{scene.name}: no read-only disk here (this needs root); left out")
            return
        scene.argv(target)
        subprocess.run(["mount", "-o", "remount,ro", str(target)], check=True)
        outcome = _elsewhere(scene, target, box).wait()
        yield from (f"read-only: {fault}" for fault in _told(outcome))
    shutil.rmtree(target.parent)


def _two_folders(scene: Scene, name: str) -> tuple[Path, Path]:
    """Return a new folder for what is written, and one for the output of the command."""
    top = scene.sandbox.root / f"{scene.name}-{name}"
    shutil.rmtree(top, ignore_errors=True)
    (top / "target").mkdir(parents=True)
    return top / "target", top / "box"


def _elsewhere(scene: Scene, target: Path, box: Path, limit: int | None = None) -> Run:
    """Start the command in one folder, so that it writes to another."""
    work = command(scene.argv(target))

    def limited() -> Any:
        if isinstance(scene, HubCache):
            os.environ["HOME"] = str(target)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return work()

    return Run(limited, box, scene.sandbox, 120, network=True)


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[bool]:
    """Mount a disk in memory; yield whether that worked."""
    call = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    fits = (
        shutil.which("mount") is not None
        and not subprocess.run(call, stderr=subprocess.DEVNULL).returncode
    )
    try:
        yield fits
    finally:
        if fits:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def two_at_once(scene: Scene) -> Iterator[str]:
    """Yield what is lost when two commands write the same."""
    target, box = _two_folders(scene, "two")
    boxes = [target, box] if isinstance(scene, HubCache) else [box.with_name("a"), box]
    outcomes = [run.wait() for run in [_elsewhere(scene, target, each) for each in boxes]]
    told = [outcome.message[-1:] for outcome in outcomes]
    if all(outcome.status != 0 for outcome in outcomes):
        yield f"two at once: both failed: {told}"
    for outcome in outcomes:
        if outcome.status != 0:
            yield from (f"two at once: {fault}" for fault in _told(outcome))
    if isinstance(scene, HubCache) and any(outcome.status != 0 for outcome in outcomes):
        yield f"two at once: one failed: {told}"
    if scene.result(target) != scene.whole:
        yield "two at once: another result than alone"
    shutil.rmtree(target.parent)


def _hub(folder: Path) -> tuple[int, str]:
    """Start a hub that has one checkpoint in a child; return its id and address."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        from ..hub_server import running

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it tells of every client that is killed
        with running() as hub:
            hub.repos["someone/clex"] = folder
            os.write(writing, hub.url.encode() + b"\n")
            signal.pause()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        return pid, lines.readline().strip()


SCENES: tuple[type[Scene], ...] = (Conversion, Training, PromptCache, ResultFiles, HubCache)
TRIALS: tuple[Callable[[Scene], Iterator[str]], ...] = (full_disk, read_only, two_at_once)


def main() -> None:
    """Kill, print the counts, and exit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="kills of all scenes together")
    parser.add_argument("--only", default="", help="scenes whose name has this text")
    parser.add_argument("--seed", type=int, help="of the instants; default: another every time")
    args = parser.parse_args()
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}")
    began, rng = time.monotonic(), random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="crash-")).resolve()
    hub, url = _hub(Path(__file__).parents[1] / "golden" / "clex_llama_gqa_log_scale")
    lost: list[str] = []
    try:
        warm_up(url, root / "hub")
        sandbox = Sandbox(root)
        make_bases(sandbox)
        for kind in SCENES:
            if args.only not in kind.name:
                continue
            scene = kind(sandbox)
            faults = list(kill(scene, args.kills // len(SCENES), rng))
            for trial in TRIALS:
                found = list(trial(scene))
                print(f"{scene.name:14}{trial.__name__.replace('_', ' '):14}{len(found)} lost")
                faults += found
            lost += [f"{scene.name}: {fault}" for fault in faults]
    finally:
        os.kill(hub, signal.SIGKILL)
        os.waitpid(hub, 0)
        shutil.rmtree(root, ignore_errors=True)
    for fault in lost:
        print(f"LOST   {fault}")
    print(f"{len(lost)} lost, {time.monotonic() - began:.0f} s.")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
