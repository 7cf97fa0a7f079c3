"""Run a command of mlx_clex in a child process, and watch what it does.

The child is forked from this process, which has imported everything and used nothing of MLX, so
a command starts in milliseconds. An audit hook in the child reports what Python does outside the
sandbox; limits of the system hold its memory, its processor time and the size of its files.

Not covered: what C++ code opens. Files outside are therefore also compared after the command.
macOS, whose Metal device does not survive a fork: there the trials need Linux.
"""

import contextlib
import importlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = "the-secret-of-a-file-outside"  # noqa: S105 - of the trial
MEMORY = 300 << 20  # bytes above a valid run
_ADDRESSES = 12 << 30  # bytes of address space; beyond it, malloc fails instead of the machine
_FILE = 4 << 30  # bytes of a file that a command may write
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
_CHANGES: tuple[str, ...] = (
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.symlink",
)
_CHANGES += ("os.chmod", "os.truncate", "os.utime", "shutil.rmtree")
_WORKER = Path(__file__).parents[2] / "mlx_clex" / "checkpoint" / "render_worker.py"
_MEMORY_OF = ["ps", "-o", "rss=", "-p"]
# Imported before the first fork; importing takes seconds.
_WARM: tuple[str, ...] = (
    "torch",
    "gguf",
    "transformers.models.auto.tokenization_auto",
    "sentencepiece",
)
_WARM += ("transformers.models.llama.tokenization_llama", "mlx_lm.tokenizer_utils", "mlx_lm.lora")
_WARM += ("mlx_lm.models.llama", "mlx_lm.models.phi", "mlx_clex.convert.__main__", "gguf.quants")
_WARM += ("mlx_clex.convert.read.gguf_file", "mlx_clex.convert.read.torch_bin")
_WARM += ("mlx_clex.convert.freeze.gguf_export", "mlx_clex.convert.read.gguf_tokenizer")
_WARM += ("mlx_clex.diagnosis.model_report", "mlx_clex.training.loop", "matplotlib.pyplot")
_WARM += ("transformers.models.llama.modeling_llama", "transformers.generation")
_WARM += ("matplotlib.backends.backend_agg", "mlx_clex.pictures.style", "PIL.Image", "yaml")


@dataclass
class Outcome:
    """What a command did."""

    status: int  # negative: the signal that ended it
    seconds: float
    cpu: float  # seconds
    peak: int  # bytes of memory
    out: str
    err: str
    seen: list[str]  # what the audit hook saw

    @property
    def message(self) -> list[str]:
        """Return the lines of stderr that are neither notes nor progress bars."""
        lines = [line.rpartition("\r")[2].strip() for line in self.err.split("\n")]
        bars = re.compile(r"\d+%\||\x1b\[A$|^Writing: [\d.]+\w*B \[")
        return [x for x in lines if x and not x.startswith("[mlx_clex]") and not bars.search(x)]


class Sandbox:
    """A folder that commands may change, and files outside it that they may not."""

    def __init__(self, root: Path) -> None:
        """Make the folder with a home, and the files outside.

        Args:
            root: an empty folder of this trial.
        """
        self.root = root
        self.temporary = root / "tmp"  # MLX keeps its compiled kernels there
        self.outside = root / "outside"
        for folder in (self.temporary, self.outside):
            folder.mkdir()
        kernels = Path(tempfile.gettempdir()) / "mlx"
        if kernels.is_dir():  # g++ takes seconds for each kernel
            skip = shutil.ignore_patterns("tmp_*")
            shutil.copytree(kernels, self.temporary / "mlx", ignore=skip)
        (self.outside / "secret.json").write_text(json.dumps({"secret": SECRET}))
        (self.outside / "secret.txt").write_text(SECRET)
        (self.outside / "rows.jsonl").write_text(json.dumps({"text": f"{SECRET} " * 20}) + "\n")
        self.bases = root / "bases"  # whole folders, which commands read and do not change
        self.bases.mkdir()
        self.before: dict[str, tuple[int, int]] = {}

    def state(self) -> dict[str, tuple[int, int]]:
        """Return size and time of every file that no command may change."""
        found = [*self.outside.rglob("*"), *self.bases.rglob("*")]
        return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in found if not p.is_dir()}

    def changed(self) -> list[str]:
        """Return what is no longer as it was when `before` was set."""
        now = self.state()
        names = {**now, **self.before}
        return [f"changed {name}" for name in names if now.get(name) != self.before.get(name)]

    def start(self, argv: Sequence[str], box: Path, *, seconds: int = 60, stdin: str = "") -> "Run":
        """Start a command of mlx_clex.

        Args:
            argv: its name and arguments.
            box: the folder that it may change; it becomes the working folder.
            seconds: of processor time, at most.
            stdin: what it reads there.
        """
        return Run(command(argv), box, self, seconds, stdin)

    def run(self, argv: Sequence[str], box: Path, *, seconds: int = 60, stdin: str = "") -> Outcome:
        """Run a command of mlx_clex to its end."""
        return self.start(argv, box, seconds=seconds, stdin=stdin).wait()


def command(argv: Sequence[str]) -> Callable[[], Any]:
    """Return a function that does what `mlx_clex ARGV` does."""
    name = "convert.__main__" if argv[0] == "convert" else argv[0]

    def work() -> Any:
        sys.argv = [f"mlx_clex {argv[0]}", *argv[1:]]
        sys.exit(importlib.import_module(f"mlx_clex.{name}").main())

    return work


class Run:
    """A child process that does something in a box."""

    def __init__(
        self,
        work: Callable[[], Any],
        box: Path,
        sandbox: Sandbox,
        seconds: int = 60,
        stdin: str = "",
        *,
        network: bool = False,
    ) -> None:
        """Fork.

        Args:
            work: what the child does.
            box: its working folder, which has its home and the files of its output.
            sandbox: that the box is in.
            seconds: of processor time, at most.
            stdin: what it reads there.
            network: let it ask the network.
        """
        self.box = box
        self.limit: float = 20 * seconds  # a busy machine gives a process little of its time
        (box / "home").mkdir(parents=True, exist_ok=True)
        for name, text in (("stdin", stdin), ("stdout", ""), ("stderr", ""), ("seen", "")):
            (box / f"{name}.txt").write_text(text, errors="surrogateescape")
        sys.stdout.flush()
        sys.stderr.flush()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _child(work, box, sandbox, seconds, network)

    def poll(self) -> Outcome | None:
        """Return the outcome of an ended child, or None; end one that takes too long."""
        if time.monotonic() - self.started > self.limit:
            self.kill()
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        return None if pid == 0 else self._outcome(status, usage)

    def wait(self) -> Outcome:
        """Return the outcome, when the child has ended."""
        while (outcome := self.poll()) is None:
            time.sleep(0.01)
        return outcome

    def kill(self) -> None:
        """Send SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _outcome(self, status: int, usage: Any) -> Outcome:
        def text(name: str) -> str:
            return (self.box / f"{name}.txt").read_text(errors="replace")

        return Outcome(
            status=os.waitstatus_to_exitcode(status),
            seconds=time.monotonic() - self.started,
            cpu=usage.ru_utime + usage.ru_stime,
            peak=usage.ru_maxrss * 1024,
            out=text("stdout"),
            err=text("stderr"),
            seen=list(dict.fromkeys(text("seen").splitlines())),
        )


def warm_up(hub: str = "http://127.0.0.1:9", hub_home: Path | None = None) -> None:
    """Import what commands import, so that children need not.

    Args:
        hub: the address that stands for Hugging Face's; by default nothing listens there.
        hub_home: the folder of downloads.
    """
    # Before the imports, which read them.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["HF_ENDPOINT"] = hub
    if hub_home is not None:
        os.environ["HF_HOME"] = str(hub_home)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["MPLBACKEND"] = "agg"
    os.environ.pop("HF_HUB_OFFLINE", None)  # whoever asks the network is to be seen
    front = importlib.import_module("mlx_clex.__main__")
    names = [name for name in front.NAMES if name not in ("web", "evaluate", "convert")]
    for module in [*(f"mlx_clex.{name}" for name in names), *_WARM]:
        importlib.import_module(module)
    platform.processor()  # starts uname, once
    from transformers import AutoConfig

    AutoConfig.for_model("llama")
    threads = Path("/proc/self/task")
    if threads.is_dir() and len(list(threads.iterdir())) > 1:
        print(f"note: {len(list(threads.iterdir()))} threads before the first fork", flush=True)


def _child(
    work: Callable[[], Any], box: Path, sandbox: Sandbox, seconds: int, network: bool
) -> None:
    """Do the work, and end with its status; never return."""
    status = 99
    try:
        os.setpgid(0, 0)
        os.chdir(box)
        os.environ["HOME"] = str(box / "home")
        os.environ["TMPDIR"] = tempfile.tempdir = str(sandbox.temporary)
        for number, name, flags in (
            (0, "stdin", os.O_RDONLY),
            (1, "stdout", os.O_WRONLY),
            (2, "stderr", os.O_WRONLY),
        ):
            os.dup2(os.open(box / f"{name}.txt", flags), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _watch(box, sandbox, network)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def _watch(box: Path, sandbox: Sandbox, network: bool) -> None:
    """Report what Python does outside the box from here on; refuse the network or allow it."""
    report = os.open(box / "seen.txt", os.O_WRONLY | os.O_APPEND)
    inside = [os.path.realpath(path) for path in (box, sandbox.temporary)] + ["/dev/", "/proc/self"]
    outside, case = os.path.realpath(sandbox.outside), os.path.realpath(box) + os.sep
    busy = False

    def is_inside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        real = os.path.realpath(os.fsdecode(path))
        return any(real.startswith(top) for top in inside)

    def look(event: str, args: Any) -> str | None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or path is None:
                return None
            if (flags or 0) & _WRITING and not is_inside(path):
                return f"wrote {os.fsdecode(path)}"
            if os.path.realpath(os.fsdecode(path)).startswith(outside):
                return f"read {os.fsdecode(path)}"
        elif event in _PROGRAMS and not _is_ours(args):
            return f"ran {event} {args!r:.200}"
        elif event in _NETWORK and not network:
            return f"asked the network {args!r:.200}"
        elif event in _CHANGES and not all(
            is_inside(arg) for arg in args if isinstance(arg, str | bytes)
        ):
            return f"{event} {args!r:.200}"
        elif event == "exec" and str(getattr(args[0], "co_filename", "")).startswith(case):
            return f"ran code of {args[0].co_filename}"
        return None

    def hook(event: str, args: Any) -> None:
        nonlocal busy
        if busy or event not in _EVENTS:
            return
        busy = True
        try:
            what = look(event, args)
            if what:
                os.write(report, what.encode(errors="replace").replace(b"\n", b" ") + b"\n")
        finally:
            busy = False
        if what and what.startswith("asked"):
            raise OSError("The trial has no network.")

    sys.addaudithook(hook)


def _is_ours(args: Any) -> bool:
    """Return whether a program is the one that renders chat templates, or looks at its memory."""
    program = [str(arg) for arg in args[1]] if len(args) > 1 and args[1] else []
    return program == [sys.executable, "-P", str(_WORKER)] or program[:-1] == _MEMORY_OF


_EVENTS = frozenset(("open", "exec", *_PROGRAMS, *_NETWORK, *_CHANGES))
