"""Options of `chat` and `web`, and the conversation that they describe."""

import argparse
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from ..checkpoint.fingerprint import fingerprint
from ..errors import InputError
from ..loading import load, resolve
from ..serving.conversation import Conversation
from .memory_check import MemoryCheck, add_force
from .options import add_shared, check_ranges, loading_options, sampler_at


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `mlx_lm.chat` does not have, or has with another meaning."""
    add_shared(parser, "--model", "--max-kv-size")
    add_shared(
        parser,
        "--scale",
        help="prompt (default): the scale of the whole conversation at the start of a turn, which "
        "then grows with the answer. grow: the scale of the text read so far. NUMBER: a fixed "
        "scale.",
    )
    parser.add_argument("--pipeline", action="store_true", help="Refused: for one machine only.")
    add_force(parser)


def check_chat_options(args: argparse.Namespace) -> None:
    """Refuse options before anything is loaded.

    Raises:
        InputError: an option that cannot be used.
    """
    if args.model is None:
        raise InputError("No model: give a folder, a .gguf file or a Hugging Face id as --model.")
    if args.max_kv_size is not None:
        raise InputError(
            "--max-kv-size drops old text from the cache, which is the text a long-context "
            "model is for. Leave it out."
        )
    if args.pipeline:
        raise InputError("--pipeline is for several machines, and this runs on one. Leave it out.")
    check_ranges(args)


def load_conversation(args: argparse.Namespace) -> Callable[[], Conversation]:
    """Load the model, and return a function that starts a conversation with it.

    Raises:
        InputError: the model cannot be loaded.
    """
    mx.random.seed(args.seed)
    folder = resolve(args.model)
    check = MemoryCheck(force=args.force, kv_bits=False)
    check_length = partial(check.reading, step=args.prefill_step_size)
    before_reading = check.at_load(partial(check_length, max(1, args.max_tokens)))
    model, tokenizer = load(folder, **loading_options(args), before_reading=before_reading)
    identity = fingerprint(model, folder, args.adapter_path)

    def start() -> Conversation:
        return Conversation(
            model,
            tokenizer,
            identity=identity,
            policy=args.scale,
            system_prompt=args.system_prompt,
            max_tokens=args.max_tokens,
            prefill_step_size=args.prefill_step_size,
            sampler=sampler_at(args.temp, args, tokenizer),
            check_length=check_length,
        )

    return start
