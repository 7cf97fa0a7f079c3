"""Parse and check options that several commands share.

Not covered: options of a scaling (`scaling_options.py`).
"""

import argparse
import math

from ..errors import InputError

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
    if args.quantized_kv_start < 0:
        raise InputError(f"--quantized-kv-start must be at least 0, got {args.quantized_kv_start}.")


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
    """Refuse an option below its least value; None stands for a default.

    Raises:
        InputError: the message names the option.
    """
    value = getattr(args, name)
    if value is not None and value < least:
        raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
