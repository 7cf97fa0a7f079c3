"""Command: one page in the browser, to talk with a model over long documents.

The conversation is that of `chat.py`; the page adds a place to drop a document and a
meter of the context. It is served on 127.0.0.1 alone and asks for nothing elsewhere: no
fonts, no statistics, no public link.

MLX ties what it computes to a thread, and the page is served from many: so the model is
loaded and run in one thread, which takes one turn at a time.

Not covered: more than one user.
"""

import argparse
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.chat import setup_arg_parser

from .commands.chat_options import add_chat_arguments, check_chat_options, load_conversation
from .commands.run_command import run_command
from .errors import InputError, RunError
from .serving.conversation import Context, Conversation, Stopped
from .serving.prompt import read_text

HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add to the options of `chat`."""
    add_chat_arguments(parser)
    parser.add_argument("--port", type=int, default=7860, help="of the page (default: 7860)")


class Turns:
    """Runs generators in the one thread that has the model."""

    def __init__(self, load: Callable[[], Callable[[], Conversation]]) -> None:
        """Start the thread and load there.

        Raises:
            InputError: the model cannot be loaded.
        """
        # None ends the thread.
        self._jobs: queue.Queue[tuple[Callable[[], Iterator[Any]], queue.Queue[Any]] | None] = (
            queue.Queue()
        )
        self._load = load
        self.conversation: Conversation
        loaded: queue.Queue[Exception | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(loaded,), daemon=True)
        self._thread.start()
        error = loaded.get()
        if error is not None:
            self._thread.join()
            raise error

    def _work(self, loaded: "queue.Queue[Exception | None]") -> None:
        try:
            self.conversation = self._load()()
            loaded.put(None)
            while (work := self._jobs.get()) is not None:
                job, results = work
                try:
                    for result in job():
                        results.put((result, None))
                    results.put((None, StopIteration()))
                except Exception as error:
                    results.put((None, error))
        except Exception as error:
            loaded.put(error)
        finally:
            # What MLX keeps for a thread that ends unasked can end the interpreter with it.
            mx.clear_streams()

    def close(self) -> None:
        """End the thread, after the pass under way."""
        self._jobs.put(None)
        while self._thread.is_alive():
            self.conversation.stop.set()
            self._thread.join(timeout=0.1)

    def run(self, job: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """What `job` yields, from the other thread; its exceptions come out here."""
        results: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        self._jobs.put((job, results))
        while True:
            result, error = results.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield result


def meter(context: Context) -> str:
    """The context as HTML: a bar where it has an end, and its figures."""
    bar = ""
    if context.reach is not None:
        bar = f'<progress value="{context.tokens}" max="{context.reach}"></progress>'
    reach = "no limit" if context.reach is None else f"of {context.reach}"
    return (
        f'{bar}<div class="figures"><b>{context.tokens}</b> {reach} tokens<br>'
        f"scale <b>{context.scale:g}</b><br>"
        f"{context.nbytes / 1e6:.1f} MB of keys and values</div>"
    )


def _excerpt(text: str) -> str:
    """The two ends of a long text: a page that holds a whole book is slow."""
    return text if len(text) <= 1000 else f"{text[:300]}\n\n[...]\n\n{text[-300:]}"


def build_page(turns: Turns, title: str) -> Any:
    """The page, as gradio Blocks."""
    import gradio as gr

    conversation = turns.conversation

    def shown() -> list[dict[str, str]]:
        return [
            {"role": message["role"], "content": _excerpt(message["content"])}
            if message["role"] == "user"
            else dict(message)
            for message in conversation.messages
        ]

    def send(message: str) -> Iterator[tuple[Any, ...]]:
        """Stream the answer to a message."""
        if not message.strip():
            yield "", shown(), meter(conversation.context()), ""
            return
        talk = [*shown(), {"role": "user", "content": message}]
        yield "", talk, meter(conversation.context()), "Reading ..."
        text, note = "", ""
        try:
            for piece in turns.run(lambda: conversation.answer(message.strip())):
                text += piece
                answer = {"role": "assistant", "content": text}
                yield "", [*talk, answer], meter(conversation.context()), ""
        except Stopped:
            note = "Stopped."
        except (InputError, RunError) as error:
            note = str(error)
        if not note and conversation.finish == "reach":
            note = "Cut at the reach of the model."
        yield "", shown(), meter(conversation.context()), note

    def drop(file: str | None) -> Iterator[tuple[Any, ...]]:
        """Read a document into the context."""
        if file is None:
            return

        def reading() -> Iterator[str]:
            count = conversation.read(read_text(file))
            yield f"Read {count} tokens of {Path(file).name}."

        yield shown(), meter(conversation.context()), "Reading ...", None
        try:
            (note,) = turns.run(reading)
        except Stopped:
            note = "Stopped."
        except (InputError, RunError) as error:
            note = str(error)
        yield shown(), meter(conversation.context()), note, None

    def reset() -> tuple[Any, ...]:
        """Start anew."""

        def forgetting() -> Iterator[None]:
            conversation.reset()
            yield None

        list(turns.run(forgetting))
        return [], meter(conversation.context()), ""

    with gr.Blocks(analytics_enabled=False, title=title, fill_height=True) as page:
        with gr.Row(scale=1):
            with gr.Column(scale=4):
                talk = gr.Chatbot(shown, label=title, elem_id="talk", height=420, buttons=["copy"])
                message = gr.Textbox(
                    label="Message", elem_id="message", submit_btn="Send", lines=1, autofocus=True
                )
            with gr.Column(scale=1, min_width=240):
                figures = gr.HTML(lambda: meter(conversation.context()), elem_id="meter")
                document = gr.File(label="Drop a document", elem_id="document", height=160)
                note = gr.Markdown(elem_id="note")
                stop = gr.Button("Stop", elem_id="stop")
                new = gr.Button("New conversation", elem_id="new")
        message.submit(send, message, [message, talk, figures, note], show_progress="hidden")
        document.upload(drop, document, [talk, figures, note, document], show_progress="hidden")
        stop.click(conversation.stop.set, queue=False)
        gr.on([new.click, talk.clear], reset, None, [talk, figures, note])
    return page


def run(args: argparse.Namespace) -> None:
    """Serve the page until interrupted.

    Raises:
        InputError: an option, the model or the port cannot be used, or gradio is missing.
    """
    check_chat_options(args)
    if not 0 < args.port < 1 << 16:
        raise InputError(f"--port must be within 1..65535, got {args.port}.")
    # Read by gradio when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio as gr
    except ImportError as error:
        raise InputError("The page needs gradio: pip install 'mlx-clex[web]'.") from error
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, args.port))
        except OSError as error:
            raise InputError(
                f"Port {args.port} of {HOST} is not free ({error.strerror}); give another --port."
            ) from error
    turns = Turns(lambda: load_conversation(args))
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    page = build_page(turns, f"mlx_clex: {Path(args.model).name}")
    try:
        page.launch(
            server_name=HOST,
            server_port=args.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            theme=theme,
            css="#meter progress { width: 100% } footer { display: none !important }",
            footer_links=[],
        )
        print(f"http://{HOST}:{args.port}/ has the page; Ctrl-C ends it.", flush=True)
        page.block_thread()
    finally:
        turns.close()


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(
        run_command(
            add_arguments,
            run,
            prog="mlx_clex.web",
            description="Talk with a model in the browser, long documents included.",
            parents=[setup_arg_parser()],
            example="mlx_clex web --model long-model --port 7861",
        )
    )


if __name__ == "__main__":
    main()
