"""Add, parse and check options that several commands share.

Not covered: options of a scaling (`scaling_options.py`).
"""

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.sample_utils import make_sampler

from ..errors import InputError, say
from ..model.own_rope import OWN_ROPE_HELP, OWN_ROPES

# Ranges of options that mlx-lm does not check, or checks late.
_RANGES = (
    ("prefill_step_size", 1, math.inf),
    ("temp", 0, math.inf),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("top_k", 0, math.inf),
    ("min_tokens_to_keep", 1, math.inf),
    ("xtc_probability", 0, 1),
    ("xtc_threshold", 0, 0.5),
    ("num_draft_tokens", 1, math.inf),
)


def scale_policy(text: str) -> str | float:
    """Parse --scale: "prompt", "grow", or a number of at least 1."""
    if text in ("prompt", "grow"):
        return text
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 1 <= scale < float("inf"):
        raise argparse.ArgumentTypeError(
            f"must be prompt, grow, or a number of at least 1 (target length / trained "
            f"length), got {text!r}"
        )
    return scale


def _option(text: str, **arguments: Any) -> dict[str, Any]:
    return {"help": text, **arguments}


# Options that several commands have: arguments of `add_argument`.
_SHARED = {
    "--model": _option("A folder, a .gguf file or a Hugging Face id."),
    "--adapter-path": _option("A folder of adapters to put on top of the model."),
    "--trust-remote-code": _option("Let the tokenizer run its own Python.", action="store_true"),
    "--scale": _option("", type=scale_policy, default="prompt", metavar="prompt|grow|NUMBER"),
    "--own-rope": _option(f"Needs a scaling. {OWN_ROPE_HELP} Default: keep.", choices=OWN_ROPES),
    "--freeze": _option(
        "Fix the scale and write a checkpoint that runs without mlx_clex. Default: keep the "
        "scaling.",
        type=float,
        metavar="SCALE",
    ),
    "--upload-repo": _option("Hub id to publish the result under. Default: none."),
    "--prompt-file": _option(
        "Read the text from a UTF-8 file of any size ('-' reads from stdin).", metavar="FILE"
    ),
    "--data": _option(
        "A .txt, .md or .jsonl file, a folder of them, or OWNER/NAME of a dataset on the hub. "
        "Default: the bundled text."
    ),
    "--split": _option(
        "Split of a folder or dataset. Default: train, which holds all files of a folder without "
        "splits; its valid is the last 5 %%, which lora holds out.",
        default="train",
        choices=("train", "valid", "test"),
    ),
    "--max-kv-size": _option("Refused: it would drop old text from the cache.", type=int),
    "--prefill-step-size": _option("Tokens of a prompt read in one pass.", type=int, default=2048),
    "--kv-bits": _option("Bits of the KV cache. Default: not quantised.", type=int),
    "--kv-group-size": _option(
        "Values of the KV cache that share a quantisation scale.", type=int, default=64
    ),
    "--quantized-kv-start": _option(
        "Quantise the KV cache from this length on.",
        type=int,
        default=DEFAULT_QUANTIZED_KV_START,
        metavar="TOKENS",
    ),
    "--output": _option(
        "Write PREFIX.json, PREFIX.csv and PREFIX.png. An interrupted run continues from them. "
        "Default: no files.",
        metavar="PREFIX",
    ),
    "--json": _option("Print one JSON object.", action="store_true"),
}


def add_shared(
    parser: argparse.ArgumentParser, *options: str, aliases: Sequence[str] = (), **changes: Any
) -> None:
    """Add options of several commands.

    Args:
        parser: parser of the command.
        options: keys of `_SHARED`.
        aliases: other names of the option.
        changes: arguments of `add_argument` that replace those in `_SHARED`.
    """
    for option in options:
        parser.add_argument(option, *aliases, **{**_SHARED[option], **changes})


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `load` that the options give."""
    return {
        "scale": args.scale if isinstance(args.scale, float) else None,
        "adapter_path": args.adapter_path,
        "trust_remote_code": args.trust_remote_code,
    }


def sampler_at(
    temperature: float, args: argparse.Namespace, tokenizer: Any
) -> Callable[[mx.array], mx.array]:
    """Return mlx-lm's sampler at this temperature, with the other options as given."""
    names = ("top_p", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability", "xtc_threshold")
    return make_sampler(
        temperature,
        **{name: getattr(args, name) for name in names if hasattr(args, name)},
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )


def say_next(model: Path) -> None:
    """Tell the command that tries a model which was written."""
    name = shlex.quote(str(model))
    say(f"Next: mlx_clex generate --model {name} --prompt hello --max-tokens 50")


def check_cache_options(args: argparse.Namespace) -> None:
    """Refuse cache options that cannot be used.

    Raises:
        InputError: --max-kv-size, or a number out of range.
    """
    if getattr(args, "max_kv_size", None) is not None:
        raise InputError(
            "--max-kv-size drops old text from the cache, but a long-context model needs that "
            "text. To save memory, use --kv-bits 8 or --kv-bits 4."
        )
    if args.kv_bits not in (None, 2, 3, 4, 5, 6, 8):
        raise InputError(f"--kv-bits must be 2, 3, 4, 5, 6 or 8, got {args.kv_bits}.")
    for name, least in (("kv_group_size", 1), ("quantized_kv_start", 0)):
        if hasattr(args, name):
            check_least(args, name, least)


def check_default_template(args: argparse.Namespace) -> None:
    """Refuse mlx-lm's option for templates that transformers no longer has.

    Raises:
        InputError: the option is given.
    """
    if args.use_default_chat_template:
        raise InputError(
            "--use-default-chat-template: transformers no longer has default templates. Give the "
            "model's tokenizer a template (for server: --chat-template), or leave it out."
        )


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse sampling options that are out of range.

    Raises:
        InputError: one is out of range; the message names it.
    """
    if args.max_tokens == 0 or args.max_tokens < -1:
        raise InputError(
            f"--max-tokens must be at least 1, or -1 for no limit, got {args.max_tokens}."
        )
    for name, low, high in _RANGES:
        value = getattr(args, name, low)
        if not low <= value <= high:
            option = name.replace("_", "-")
            raise InputError(f"--{option} must be within {low:g}..{high:g}, got {value:g}.")


def check_least(args: argparse.Namespace, name: str, least: int) -> None:
    """Refuse an option below its least value; None stands for a default, a list for its values.

    Raises:
        InputError: the message names the option.
    """
    value = getattr(args, name)
    for one in value if isinstance(value, list) else [value]:
        if one is not None and one < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {one}.")
