"""Command: one page in the browser, to talk with a model over long documents.

The page (`serving/page.py`) is served on 127.0.0.1 alone and loads nothing from elsewhere: no
fonts, no statistics, no public link.

Not covered: more than one user.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
from functools import partial
from pathlib import Path

from mlx_lm.chat import setup_arg_parser

from .commands.chat_options import (
    add_chat_arguments,
    check_chat_options,
    load_conversation,
)
from .commands.options import sampler_at
from .commands.run_command import command
from .errors import InputError, import_extra
from .serving.page import CSS, HEAD, build_page
from .serving.turns import Turns

HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `chat`, and --port."""
    add_chat_arguments(parser)
    parser.add_argument("--port", type=int, default=7860, help="Port of the page. Default: 7860.")


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
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the documents must not stay
        signal.signal(ending, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mlx_clex-") as dropped:
        os.environ["GRADIO_TEMP_DIR"] = dropped
        _serve(args)


def _serve(args: argparse.Namespace) -> None:
    gr = import_extra("gradio", "web", "The page")
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
    page = build_page(
        turns,
        f"mlx_clex: {Path(args.model).name}",
        temperature=args.temp,
        sampler_at=partial(sampler_at, args=args, tokenizer=turns.conversation.tokenizer),
    )
    try:
        page.launch(
            server_name=HOST,
            server_port=args.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            theme=theme,
            css=CSS,
            head=HEAD,
            footer_links=[],
        )
        print(f"http://{HOST}:{args.port}/ has the page; Ctrl-C ends it.", flush=True)
        page.block_thread()
    finally:
        turns.close()


main = command("web", add_arguments, run, "--model long-model --port 7861", parent=setup_arg_parser)


if __name__ == "__main__":
    sys.exit(main())
