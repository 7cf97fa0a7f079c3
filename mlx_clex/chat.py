"""Command: a conversation in the terminal that can hold long documents.

Takes the options of `mlx_lm.chat`, and its lines `q`, `r` and `h`. A line is a message, or
a command that begins with a slash (`COMMANDS`). Ctrl-C stops reading or answering between
two passes of the model, so the conversation stays whole.

Not covered: several machines, and `--max-kv-size`, whose window would drop the long text.
"""

import argparse
import contextlib
import importlib
import io
import signal
import sys
from collections.abc import Iterator
from typing import Any

from mlx_lm.chat import setup_arg_parser

from .checkpoint.files import expand
from .commands.chat_options import add_chat_arguments, check_chat_options, load_conversation
from .commands.progress import reading_bar
from .commands.run_command import command
from .data.text import read_text
from .errors import InputError, RunError, one_line
from .serving.conversation import Conversation, Progress, Stopped

COMMANDS = {
    "/load": "FILE: read a text file into the context",
    "/retry": "answer the last message again",
    "/system": "TEXT: set the system prompt and start anew",
    "/context": "tokens used, reach, scale and memory",
    "/save": "FILE: write the conversation with its cache",
    "/restore": "FILE: go on with a saved conversation; nothing is read again",
    "/reset": "start anew",
    "/help": "this list; a line that begins with a space is always a message",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}
_SHORT = {"q": "/quit", "r": "/reset", "h": "/help"}  # the commands of mlx_lm.chat
_LONG_MESSAGE = 128  # tokens from which reading a message shows a bar


def run(args: argparse.Namespace) -> None:
    """Talk until the user leaves.

    Raises:
        InputError: an option or the model cannot be used.
    """
    check_chat_options(args)
    conversation = load_conversation(args)()
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # input() then edits lines and has a history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is no text ends no chat
    print(f"{args.model}: {conversation.context()}")
    if not conversation.templated:
        print("It has no chat template: it goes on with the text that you type.")
    print("/load FILE reads a document, /retry answers again, /system TEXT sets the system prompt.")
    print("q quits, r starts anew, h lists all commands; Ctrl-C stops an answer.")
    while True:
        try:
            line = input("\n> ")
            line = _SHORT.get(line.rstrip(), line)
            if not line.isascii() and any("\ud800" <= letter <= "\udfff" for letter in line):
                raise InputError("The line is no UTF-8 text. Set the terminal to UTF-8.")
            if line.partition(" ")[0].rstrip() == "/quit":
                return
            _obey(conversation, line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nNothing to stop; Ctrl-D or /quit leaves.")
        except Stopped:
            print("Stopped; the conversation is as it was before.")
        except BrokenPipeError:
            raise
        except (InputError, RunError, OSError) as error:
            print(f"error: {one_line(error)}")


def _obey(conversation: Conversation, line: str) -> None:
    """Do what one line says."""
    if not line.startswith("/"):
        if line.strip():
            with _interruptible(conversation):
                _answer(conversation, line.strip())
        return
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    file = rest.strip("'\"")
    if command not in COMMANDS:
        raise InputError(
            f"There is no command {command}. The commands are {', '.join(COMMANDS)}. To send the "
            "line as a message, begin it with a space."
        )
    if COMMANDS[command].startswith("FILE") and not file:
        raise InputError(f"{command} needs a file: {command} FILE.")
    expand(file)
    if command == "/help":
        print("\n".join(f"{name:10}{text}" for name, text in COMMANDS.items()))
    elif command == "/reset":
        conversation.reset()
        print("The context is empty.")
    elif command == "/retry":
        with _interruptible(conversation):
            _answer(conversation, None)
    elif command == "/system":
        if not rest:
            now = conversation.system_prompt or "none"
            raise InputError(f"/system needs a text: /system TEXT. The system prompt is: {now}")
        conversation.begin(rest)
        print("The system prompt is set. The context is empty.")
    elif command == "/context":
        print(conversation.context())
    elif command == "/load":
        text = read_text(file)  # Ctrl-C ends it: a pipe without a writer has no end
        with _interruptible(conversation), _bar() as progress:
            count = conversation.read(text, progress)
        print(f"Read {count} tokens: {conversation.context()}")
    elif command == "/save":
        path = conversation.save(file)
        print(f"Saved {path} ({path.stat().st_size / 1e6:.1f} MB).")
    elif command == "/restore":
        conversation.restore(file)
        if conversation.messages:
            print(one_line(f"... {conversation.messages[-1]['content'][-200:]}"))
        print(f"Restored: {conversation.context()}")


def _answer(conversation: Conversation, message: str | None) -> None:
    """Print the answer to a message; None stands for the last one."""
    with _bar(_LONG_MESSAGE) as progress:
        if message is None:
            pieces = conversation.retry(progress)
        else:
            pieces = conversation.answer(message, progress)
        for piece in pieces:
            print(piece, end="", flush=True)
    ends = {
        "length": "cut at --max-tokens; ",
        "reach": "cut at the reach of the model; ",
        "stopped": "stopped; ",
    }
    print(
        f"\n[{ends.get(conversation.finish or '', '')}{conversation.generated} tokens, "
        f"{conversation.speed:.1f} a second; {conversation.context()}]"
    )


@contextlib.contextmanager
def _interruptible(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C inside asks the conversation to stop after the pass at hand."""

    def stop(*_: Any) -> None:
        conversation.stop.set()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _bar(least: int = 1) -> Iterator[Progress]:
    """Yield a callback that shows a bar where at least so many tokens are read."""
    with contextlib.ExitStack() as stack:
        move: Progress | None = None

        def progress(done: int, total: int) -> None:
            nonlocal move
            if move is None:
                move = stack.enter_context(reading_bar(total, enabled=total >= least))
            move(done, total)

        yield progress


main = command(
    "chat", add_chat_arguments, run, "--model long-model --max-tokens 512", parent=setup_arg_parser
)


if __name__ == "__main__":
    sys.exit(main())
