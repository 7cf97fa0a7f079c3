"""Command: read a document once and save the caches for `generate --prompt-cache-file`.

Takes the options of `mlx_lm.cache_prompt`. Adds the scale policy: the document is read at the
scale and gain of the expected length, so that document and query within that length give the
same answer as one pass over both.

Not covered: `--max-kv-size`, which would drop the start of a long text.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.cache_prompt import setup_arg_parser
from mlx_lm.generate import generate_step

from .bundled import DEFAULT
from .checkpoint.fingerprint import fingerprint
from .checkpoint.prompt_cache import save_cache, target_for
from .commands.options import add_shared, check_cache_options, loading_options
from .commands.progress import reading_bar
from .commands.run_command import command
from .data.text import encode_text, without_bos
from .errors import InputError, generating
from .loading import load, resolve
from .model.scaled_model import make_prompt_cache, scaled
from .serving.prompt import prompt_text, render_messages, say_if_past_training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options that `mlx_lm.cache_prompt` does not have or defines differently."""
    parser.set_defaults(model=DEFAULT)
    parser.add_argument(
        "--prompt",
        default=None,
        help="The text to read ('-' reads from stdin). With --prompt-file it follows the file's "
        "text.",
    )
    add_shared(parser, "--prompt-file", "--max-kv-size")
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="Cache the bare text, for generate --ignore-chat-template.",
    )
    add_shared(
        parser,
        "--scale",
        help="prompt (default): the scale of --expected-length. grow: the scale of the text read "
        "so far. NUMBER: a fixed scale; give generate the same.",
    )
    parser.add_argument(
        "--expected-length",
        type=int,
        default=None,
        metavar="TOKENS",
        help="Needs --scale prompt. Length of text and query together; with --kv-bits, of the "
        "answer too. Up to this length the answer is that of one pass (default: the length of the "
        "text).",
    )


def run(args: argparse.Namespace) -> None:
    """Read the text and write the cache file.

    Raises:
        InputError: an option, file or length cannot be used.
        RunError: the file cannot be written, or MLX failed.
    """
    check_cache_options(args)
    if args.prompt is None and args.prompt_file is None:
        raise InputError("There is no text: give it with --prompt or --prompt-file.")
    if args.expected_length is not None and args.scale != "prompt":
        raise InputError("--expected-length needs --scale prompt, which is the default.")
    file = target_for(args.prompt_cache_file)
    text = prompt_text(args)
    folder = resolve(args.model)
    tokenizer_config = {"eos_token": args.eos_token} if args.eos_token is not None else {}
    model, tokenizer = load(folder, **loading_options(args), tokenizer_config=tokenizer_config)
    limit = scaled(model).limit
    tokens = _encode(tokenizer, text, templated=not args.ignore_chat_template, limit=limit)
    expected = _expected_length(args, model, len(tokens))
    say_if_past_training(model, len(tokens))
    caches = make_prompt_cache(model, expected)
    start = time.perf_counter()
    _read(args, model, tokens, caches)
    seconds = time.perf_counter() - start
    # An absolute path, so that `generate` finds the model from any folder.
    name = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    metadata = {"model": name, "tokenizer_config": json.dumps(tokenizer_config)}
    save_cache(file, caches, fingerprint(model, folder, args.adapter_path), metadata)
    print(f"Prompt: {len(tokens)} tokens, {len(tokens) / seconds:.3f} tokens-per-sec")
    print(f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB")
    if scaled(model).scaling is not None:
        planned = expected or len(tokens)
        print(f"Scale: {model.scale_at(planned):g}, the scale of {planned} tokens")
    print(f"Saved: {file}, {file.stat().st_size / 1e6:.1f} MB")


def _encode(tokenizer: Any, text: str, *, templated: bool, limit: int | None = None) -> list[int]:
    """Return the tokens of the text; with a chat template, as an unfinished user message."""
    if templated and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": "<query>"}]
        rendered = render_messages(tokenizer, messages, add_generation_prompt=True)
        # `generate` adds the query and the rest of the template.
        begin, query, _ = rendered.partition("<query>")
        if not query:
            raise InputError(
                "This model's chat template drops the message. Give --ignore-chat-template."
            )
        after = begin + without_bos(tokenizer, text)
        tokens = encode_text(tokenizer, after, begins=False, limit=limit)
    else:
        tokens = encode_text(tokenizer, text, begins=True, limit=limit)
    if not text or not tokens:
        raise InputError("The text is empty: give one with --prompt or --prompt-file.")
    return tokens


def _expected_length(args: argparse.Namespace, model: nn.Module, length: int) -> int | None:
    """Return the length that sets the scale, in tokens; None: the length read so far."""
    scaled(model).check_length(length, "The text")
    if args.scale != "prompt":
        return None
    if args.expected_length is not None and args.expected_length < length:
        raise InputError(
            f"--expected-length {args.expected_length} is less than the {length} tokens of the "
            "text. Give the length of text and query together."
        )
    scaled(model).check_length(args.expected_length or 0, "The text of --expected-length")
    return args.expected_length or length


def _read(args: argparse.Namespace, model: nn.Module, tokens: list[int], caches: list[Any]) -> None:
    read = 0

    def count(done: int, total: int) -> None:
        nonlocal read
        read = done
        progress(done, total)

    with reading_bar(len(tokens)) as progress:
        steps = generate_step(
            mx.array(tokens),
            model,
            max_tokens=0,
            prompt_cache=caches,
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
            prompt_progress_callback=count,
        )
        with generating(lambda: f"after {read} tokens"):
            for _ in steps:
                pass


main = command(
    "cache_prompt",
    add_arguments,
    run,
    "--model my-model --prompt-file book.txt --prompt-cache-file book",
    parent=setup_arg_parser,
)


if __name__ == "__main__":
    sys.exit(main())
