"""Command: a conversation in the terminal that can hold long documents.

It takes the options of `mlx_lm.chat`. A line is a message, or a command that begins with
a slash (`COMMANDS`). Ctrl-C stops what is being read or written, between two passes of
the model, so that the conversation stays whole.

Not covered: sharding over several machines, and `--max-kv-size`, whose window would drop
the text that a scaling is there to reach.
"""

import argparse
import contextlib
import importlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from mlx_lm.chat import setup_arg_parser
from tqdm import tqdm

from .commands.chat_options import add_chat_arguments, check_chat_options, load_conversation
from .commands.run_command import run_command
from .errors import InputError, RunError
from .serving.conversation import Conversation, Progress, Stopped, read_text

COMMANDS = {
    "/load": "FILE: read a text file into the context",
    "/context": "tokens used, reach, scale and memory",
    "/save": "FILE: write the conversation with its cache",
    "/restore": "FILE: go on with a saved one; nothing is read again",
    "/reset": "forget everything",
    "/help": "this list; a line that begins with a space is always a message",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


def run(args: argparse.Namespace) -> None:
    """Talk until the user leaves.

    Raises:
        InputError: an option or the model cannot be used.
    """
    check_chat_options(args)
    conversation = load_conversation(args)()
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # input() then edits lines and has a history
    print(f"{args.model}: {conversation.context()}")
    if not conversation.templated:
        print("It has no chat template: it goes on with the text that you type.")
    print("/load FILE reads a document, /help lists all commands.")
    while True:
        try:
            line = input("\n> ")
            if line.rstrip() == "/quit":
                return
            _obey(conversation, line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nNothing to stop; Ctrl-D or /quit leaves.")
        except Stopped:
            print("Stopped; the conversation is as it was before.")
        except (InputError, RunError) as error:
            print(f"error: {' '.join(str(error).split())}")


def _obey(conversation: Conversation, line: str) -> None:
    """Do what one line says."""
    if not line.startswith("/"):
        if line.strip():
            with _interruptible(conversation):
                _answer(conversation, line.strip())
        return
    command, _, rest = line.strip().partition(" ")
    file = rest.strip().strip("'\"")
    if command not in COMMANDS:
        raise InputError(
            f"There is no command {command}; it has {', '.join(COMMANDS)}. To send the line as a "
            "message, begin it with a space."
        )
    if COMMANDS[command].startswith("FILE") and not file:
        raise InputError(f"{command} needs a file: {command} FILE.")
    if command == "/help":
        print("\n".join(f"{name:10}{text}" for name, text in COMMANDS.items()))
    elif command == "/reset":
        conversation.reset()
        print("The context is empty.")
    elif command == "/context":
        print(conversation.context())
    elif command == "/load":
        with _interruptible(conversation), _bar(always=True) as progress:
            count = conversation.read(read_text(file), progress)
        print(f"Read {count} tokens: {conversation.context()}")
    elif command == "/save":
        path = conversation.save(file)
        print(f"Saved {path} ({path.stat().st_size / 1e6:.1f} MB).")
    elif command == "/restore":
        conversation.restore(file)
        if conversation.messages:
            print(f"... {conversation.messages[-1]['content'][-200:].strip()}")
        print(f"Restored: {conversation.context()}")


def _answer(conversation: Conversation, message: str) -> None:
    with _bar(always=False) as progress:
        for piece in conversation.answer(message, progress):
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
def _bar(*, always: bool) -> Iterator[Progress]:
    """A progress bar on stderr, from the second pass on if not `always`."""
    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and (always or done < total):
            bar = tqdm(total=total, unit="tok", desc="Reading")
        if bar is not None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(
        run_command(
            add_chat_arguments,
            run,
            prog="mlx_clex.chat",
            description="Talk with a model in the terminal, long documents included.",
            parents=[setup_arg_parser()],
        )
    )


if __name__ == "__main__":
    main()
