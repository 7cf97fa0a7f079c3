"""Options of `chat` and `web`, and the conversation that they describe."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from ..checkpoint.fingerprint import fingerprint
from ..errors import InputError
from ..loading import load, resolve
from ..serving.conversation import Conversation
from .memory_check import MemoryCheck, add_force
from .options import check_ranges, scale_policy


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `mlx_lm.chat` does not have, or has with another meaning."""
    parser.add_argument(
        "--model", default=None, help="A folder with a model, a .gguf file, or a Hugging Face id."
    )
    parser.add_argument(
        "--scale",
        type=scale_policy,
        default="prompt",
        metavar="prompt|grow|NUMBER",
        help="prompt (default): the scale of the whole conversation at the start of a turn, which "
        "then grows with the answer. grow: the scale of the text read so far. NUMBER: a fixed "
        "scale.",
    )
    parser.add_argument(
        "--max-kv-size",
        type=int,
        default=None,
        help="Refused: it would drop old text from the cache.",
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
    check = MemoryCheck(force=args.force)
    check_length = partial(check.reading, step=args.prefill_step_size)
    model, tokenizer = load(
        folder,
        scale=args.scale if isinstance(args.scale, float) else None,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
        before_reading=check.at_load(partial(check_length, args.max_tokens)),
    )
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


def sampler_at(
    temperature: float, args: argparse.Namespace, tokenizer: Any
) -> Callable[[mx.array], mx.array]:
    """Return mlx-lm's sampler at this temperature, with the other options as given."""
    return make_sampler(
        temperature,
        args.top_p,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
