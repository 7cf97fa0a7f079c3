"""`make test-hostile`: every hostile folder and request, and what was lost.

Each case starts from a whole folder, which is broken in one way. The commands that it concerns run
on it in children with limits (`sandbox.py`). A command that refuses must end with the expected
status and one line on stderr; none may run code of the case, read or change a file outside, ask
the network, take more than 300 MB above a valid run, or take longer than its limit.

Run it as `python -m tests.hostile.trial [--only PATTERN] [--sample N] [--jobs N] [--keep FOLDER]`.
"""

import argparse
import itertools
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import cases_config, cases_data, cases_tokenizer, cases_trained, cases_weights
from .bases import make_bases, valid_case
from .case import COMMANDS, REFUSED, Case
from .known import KNOWN
from .requests import try_requests
from .sandbox import MEMORY, SECRET, Outcome, Run, Sandbox, warm_up

_SECONDS = 30  # of processor time of a command
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]")
_UP = "\x1b[A"  # of progress bars
_SPEED = re.compile(r"[\d.]+ a second|[\d.,]+ (?:GB|MB)|error: [^\n]*\n")


@dataclass
class Tally:
    """Counts of a kind of case."""

    cases: int = 0
    commands: int = 0
    refused: int = 0
    known: int = 0
    lost: int = 0


@dataclass
class Job:
    """A case under way."""

    case: Case
    box: Path
    left: list[str]
    run: Run | None = None
    command: str = ""
    faults: list[str] = field(default_factory=list)


class Trial:
    """Runs cases, some at a time."""

    def __init__(self, sandbox: Sandbox) -> None:
        """Make the whole folders, and run every command on one that is whole."""
        self.sandbox = sandbox
        self.tallies: dict[str, Tally] = {}
        self.times: list[tuple[float, str]] = []
        self.usual: dict[str, list[str]] = {}  # what a valid run does outside
        self.peaks: dict[str, int] = {}
        self.answers: dict[str, str] = {}
        self.problems: dict[str, set[str]] = {}
        make_bases(sandbox)
        sandbox.before = sandbox.state()
        for number, command in enumerate(COMMANDS):
            case = valid_case(command)
            box = sandbox.root / f"valid-{number}"
            self._prepare(case, box)
            outcome = self._start(command, box).wait()
            if outcome.status != 0:
                sys.exit(f"{command} fails on a whole folder: {outcome.err[-2000:]}")
            for what in outcome.seen:
                print(f"note: a valid {command} {what}", flush=True)
            self.usual[command] = outcome.seen
            self.peaks[command] = outcome.peak
            self.answers[command] = _answer(command, outcome)
            self.problems[command] = _problems(outcome)
            shutil.rmtree(box)

    def _prepare(self, case: Case, box: Path) -> None:
        """Make the broken folder, in a child, whose memory goes back when it ends."""
        pid = os.fork()
        if pid == 0:
            try:
                folder = box / "case"
                if case.base:
                    shutil.copytree(self.sandbox.bases / case.base, folder, symlinks=True)
                else:
                    folder.mkdir(parents=True)
                case.edit(folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"The case {case} cannot be made.")

    def _start(self, command: str, box: Path) -> Run:
        argv, stdin = COMMANDS[command]
        names = {"CASE": box / "case", "OURS": self.sandbox.bases / "ours"}
        names |= {"DATA": self.sandbox.bases / "data", "TEXT": self.sandbox.bases / "text.txt"}

        def fill(text: str) -> str:
            for name, path in names.items():
                text = text.replace(name, str(path))
            return text

        for path in box.glob("written*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        argv = [fill(arg) for arg in argv]
        return self.sandbox.start(argv, box, seconds=_SECONDS, stdin=fill(stdin))

    def run(self, cases: list[Case], jobs: int) -> None:
        """Run all cases."""
        waiting = iter([(case, number) for number, case in enumerate(cases)])
        under_way: list[Job] = []
        while True:
            while len(under_way) < jobs and (found := next(waiting, None)):
                case, number = found
                job = Job(case, self.sandbox.root / f"box-{number}", list(case.commands))
                self._prepare(case, job.box)
                self.tallies.setdefault(case.kind, Tally()).cases += 1
                under_way.append(job)
            if not under_way:
                return
            for job in list(under_way):
                if job.run is not None:
                    outcome = job.run.poll()
                    if outcome is None:
                        continue
                    self._judge(job, outcome)
                if job.left:
                    job.command = job.left.pop(0)
                    job.run = self._start(job.command, job.box)
                else:
                    under_way.remove(job)
                    shutil.rmtree(job.box, ignore_errors=True)
            time.sleep(0.005)

    def requests(self) -> None:
        """Send every hostile request to a server."""
        count, lost = try_requests(
            self.sandbox.bases / "ours", self.sandbox.outside / "secret.txt", MEMORY
        )
        for fault in lost:
            print(f"LOST   {fault}", flush=True)
        self.tallies["requests"] = Tally(commands=count, lost=len(lost))

    def _judge(self, job: Job, outcome: Outcome) -> None:
        case, command = job.case, job.command
        tally = self.tallies[case.kind]
        tally.commands += 1
        tally.refused += outcome.status == 2
        name = f"{case}: {command}"
        self.times.append((outcome.cpu, name))
        faults = list(self._faults(job, outcome))
        reason = next((KNOWN[key] for key in (name, str(case)) if key in KNOWN), None)
        if reason and faults:
            tally.known += 1
            print(f"known  {name}: {'; '.join(faults)[:200]} ({reason})", flush=True)
        elif reason:
            tally.lost += 1
            print(f"LOST   {name}: is listed as known, and passes: delete its line", flush=True)
        elif faults:
            tally.lost += 1
            print(f"LOST   {name}: {'; '.join(faults)}", flush=True)

    def _faults(self, job: Job, outcome: Outcome) -> Iterator[str]:
        case, command = job.case, job.command
        expected = case.expected(command)
        told = outcome.status == 0 and bool(_problems(outcome) - self.problems[command])
        if outcome.status != expected and not (expected == REFUSED and told):
            yield f"status {outcome.status}, not {expected}; {outcome.message[-3:]}"
        elif outcome.status != 0:
            lines = outcome.message
            if len(lines) != 1 or not lines[0].startswith("mlx_clex "):
                yield f"{len(lines)} lines on stderr: {lines[:3]}"
            left = [path.name for path in job.box.glob("written*")]
            left += [path.name for path in job.box.rglob("*incomplete*")]
            if left:
                yield f"left behind: {left}"
        if "Traceback" in outcome.err:
            yield f"a traceback: {outcome.message[-1:]}"
        if found := _CONTROL.search(outcome.err.replace("\r", "").replace(_UP, "")):
            yield f"a control character on stderr: {found[0]!r}"
        yield from (what for what in outcome.seen if what not in self.usual[command])
        yield from self.sandbox.changed()
        if list(job.box.rglob("canary")):
            yield "code of the case ran"
        if SECRET in outcome.out + outcome.err or _holds_secret(job.box):
            yield "the secret of a file outside"
        over = outcome.peak - self.peaks[command]
        if over > MEMORY:
            yield f"{over >> 20} MB above a valid run"
        answers = case.base in ("ours", "cache") and command in ("generate", "chat", "cache-alone")
        if command == "restore" and outcome.out.count("error: ") != 1:
            yield f"no error of one line: {outcome.out[-300:]!r}"
        same = answers and expected == 0 and not case.changes
        if (same or command == "restore") and _answer(command, outcome) != self.answers[command]:
            yield f"another answer: {_answer(command, outcome)[-300:]!r}"


def _problems(outcome: Outcome) -> set[str]:
    """Return the lines in which doctor says what is wrong."""
    return {line for line in outcome.out.splitlines() if line.startswith("problem ")}


def _answer(command: str, outcome: Outcome) -> str:
    """Return what a command answered, without figures that differ from run to run."""
    if command in ("generate", "cache-alone"):
        return outcome.out.split("==========")[1] if "==========" in outcome.out else ""
    # The first line of a chat names its folder.
    text = _SPEED.sub("", outcome.out.partition("\n")[2])
    return "\n".join(
        line for line in text.splitlines() if "Restored" not in line and "..." not in line
    )


def _holds_secret(box: Path) -> bool:
    for path in itertools.chain(box.glob("written*"), (box / "written").rglob("*")):
        if stat.S_ISREG(path.lstat().st_mode) and SECRET.encode() in path.read_bytes():
            return True
    return False


def all_cases() -> list[Case]:
    """Return every case; their names differ."""
    tables = (cases_config, cases_weights, cases_tokenizer, cases_trained, cases_data)
    found = [case for table in tables for case in table.cases()]
    twice = [name for name, n in Counter((c.kind, c.name) for c in found).items() if n > 1]
    assert not twice, twice
    return found


def every_nth(cases: list[Case], step: int) -> list[Case]:
    """Return every `step`-th case of each kind, its first included."""
    by_kind: dict[str, list[Case]] = {}
    for case in cases:
        by_kind.setdefault(case.kind, []).append(case)
    return [case for kind in by_kind.values() for case in kind[::step]]


def main() -> None:
    """Run the trial, print the counts, and exit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose kind and name match this pattern")
    parser.add_argument("--sample", type=int, default=1, help="every Nth case of each kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="cases at once")
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays")
    args = parser.parse_args()
    began = time.monotonic()
    warm_up()
    root = args.keep or Path(tempfile.mkdtemp(prefix="hostile-"))
    root.mkdir(exist_ok=True)
    try:
        trial = Trial(Sandbox(root.resolve()))
        chosen = [c for c in every_nth(all_cases(), args.sample) if re.search(args.only, str(c))]
        trial.run(chosen, args.jobs)
        if re.search(args.only, "requests"):
            trial.requests()
        lost = report(trial, time.monotonic() - began)
    finally:
        if not args.keep:
            shutil.rmtree(root, ignore_errors=True)
    sys.exit(lost > 0)


def report(trial: Trial, seconds: float) -> int:
    """Print the counts; return what was lost."""
    total = Tally()
    print(f"\n{'kind':22}{'folders':>9}{'commands':>10}{'refused':>9}{'known':>7}{'lost':>6}")
    for kind, tally in sorted(trial.tallies.items()):
        for name in vars(total):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        _line(kind, tally)
    _line("all", total)
    slowest = ", ".join(f"{name} {cpu:.1f} s" for cpu, name in sorted(trial.times)[:-4:-1])
    print(f"{seconds:.0f} s. Most processor time: {slowest}.")
    return total.lost


def _line(name: str, t: Tally) -> None:
    print(f"{name:22}{t.cases:9}{t.commands:10}{t.refused:9}{t.known:7}{t.lost:6}")


if __name__ == "__main__":
    main()
