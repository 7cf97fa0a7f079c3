"""A process that renders chat templates; `rendering.py` starts it by this path.

It imports neither MLX nor mlx_clex, so it starts in a second and is small. Each request and each
answer on its pipes is eight bytes of length, and so many bytes.
"""

import pickle
import resource
import sys
from pathlib import Path
from typing import Any, BinaryIO

from transformers.utils.chat_template_utils import render_jinja_template

READY, RENDERED, FAILED = b"+", b"=", b"!"


def send(pipe: BinaryIO, kind: bytes, text: str = "", errors: str = "strict") -> None:
    """Write an answer: a byte that tells its kind, and a text."""
    data = kind + text.encode("utf-8", errors)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def limit(beside: int) -> None:
    """Bound the memory of this process. Linux keeps to it; on macOS the parent watches."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (now + beside, hard))


def main() -> None:
    """Answer requests until the pipe ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    send(answers, READY)
    while len(head := requests.read(8)) == 8:
        data = requests.read(int.from_bytes(head, "little"))
        arguments, memory = pickle.loads(data)  # noqa: S301 - from the parent process
        limit(memory)
        try:
            texts: Any = render_jinja_template(**pickle.loads(arguments))[0]  # noqa: S301
            send(answers, RENDERED, texts[0])
        except MemoryError:
            send(answers, FAILED, "it takes too much memory")
        except BaseException as error:  # a template raises anything
            send(answers, FAILED, str(error)[:1000] or type(error).__name__, "replace")


if __name__ == "__main__":
    main()
