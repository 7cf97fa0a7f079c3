"""Render chat templates in a process of their own, with limits of time and memory.

A chat template is a program of the checkpoint. jinja's sandbox keeps it from files and from
Python, but not from 10 ** 11 characters or loops within loops, which no check of its text can
find. Another process can be ended, whatever it is doing. A render costs a round trip through two
pipes, a fraction of a millisecond; the process is started once, at the first render.

Not covered: templates that mlx-lm has as Python code, which do not come from the checkpoint.
"""

import atexit
import pickle
import select
import subprocess
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import tokenization_utils_base as stock
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..errors import RunError
from .render_worker import RENDERED

SECONDS = 5.0  # for one text
MEMORY = 300_000_000  # bytes, beside what the messages take
_MESSAGES = 8  # bytes of memory for each byte of the messages
_START = 120.0  # seconds until the process must be there
_GLANCE = 0.05  # seconds between two looks at its memory
_WORKER = Path(__file__).with_name("render_worker.py")

_render_here = stock.render_jinja_template
_guarded: ContextVar[bool] = ContextVar("guarded", default=False)


def guard(tokenizer: Any) -> None:
    """Make mlx-lm's tokenizer render its chat template in the other process."""
    inner = tokenizer._tokenizer
    own = type(inner).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    if own or tokenizer._chat_template is not None:
        return

    def render(*args: Any, **options: Any) -> str:
        token = _guarded.set(True)
        try:
            return inner.apply_chat_template(*args, tokenize=False, **options)
        finally:
            _guarded.reset(token)

    tokenizer._chat_template = render


def _dispatch(**arguments: Any) -> Any:
    """Stand for transformers' function, for the tokenizers of `guard` only."""
    if not _guarded.get():
        return _render_here(**arguments)
    conversations = arguments.pop("conversations")
    return [_process.render(arguments | {"conversations": [each]}) for each in conversations], []


class _Process:
    """The process, started when it is needed and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, given: dict[str, Any]) -> str:
        """Return the text of a conversation.

        Raises:
            ValueError: the template fails, or exceeds a limit.
        """
        with self._lock:
            child = self._started()
            arguments = pickle.dumps(given)
            memory = MEMORY + _MESSAGES * len(arguments)
            data = pickle.dumps((arguments, memory))
            assert child.stdin is not None
            child.stdin.write(len(data).to_bytes(8, "little") + data)
            child.stdin.flush()
            answer = self._answer(child, SECONDS, memory)
        text = answer[1:].decode()
        if answer[:1] != RENDERED:
            raise ValueError(text)
        return text

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process
            )
            try:
                self._answer(self._child, _START, sys.maxsize)
            except ValueError as error:
                raise RunError(f"The process that renders templates failed: {error}") from error
            self._base = _memory_of(self._child.pid)
        return self._child

    def _answer(self, child: "subprocess.Popen[bytes]", seconds: float, memory: int) -> bytes:
        """Return what the process sends; end it if it takes too long or too much."""
        assert child.stdout is not None
        end = time.monotonic() + seconds
        while not select.select([child.stdout], [], [], _GLANCE)[0]:
            if time.monotonic() > end:
                self.close()
                raise ValueError(f"it takes more than {seconds:g} s")
            if memory < sys.maxsize and _memory_of(child.pid) - self._base > memory:
                self.close()
                raise ValueError("it takes too much memory")
        size = int.from_bytes(child.stdout.read(8), "little")
        data = child.stdout.read(size) if size <= memory else b""
        if not size or len(data) < size:
            self.close()
            raise ValueError("it ended the process that renders it, or is too long")
        return data

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


def _memory_of(pid: int) -> int:
    """Return the resident bytes of a process; 0 where they cannot be told."""
    try:
        done = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        return 1024 * int(done.stdout)
    except (OSError, ValueError):
        return 0


_process = _Process()
atexit.register(_process.close)
_patched: Any = stock
_patched.render_jinja_template = _dispatch
