"""`make test-crash`: kills at random instants, full disks, read-only folders, two at once.

Afterwards everything opens, or the next run starts it anew; nothing that was saved is lost, and
what a run makes in the end is what it makes when nobody kills it.

Run it as `python -m tests.hostile.crash [--kills N]`.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .bases import make_bases
from .crash_scenes import SCENES, Conversion, HubCache, Scene, tree
from .sandbox import Outcome, Run, Sandbox, command, warm_up

_ROUNDS = 40  # kills of one folder before it must have been finished


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
        run.limit = rng.uniform(0, scene.seconds)  # it is killed then
        outcome = run.wait()
        in_this += 1
        if outcome.status == 0 and in_this == 1:
            scene.seconds = outcome.seconds  # the machine may be less busy by now
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
            before = tree(target) or {}
            if kind == "disk":
                with contextlib.suppress(OSError), (target / "full").open("wb") as file:
                    file.write(b"x" * (1 << 20))
            outcome = _elsewhere(scene, target, box, scene.size if kind != "disk" else None).wait()
            yield from (f"full, {kind}: {fault}" for fault in _told(outcome))
            now = tree(target) or {}
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
        make_bases(sandbox, every=False)
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
