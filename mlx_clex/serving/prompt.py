"""The tokens of a prompt, from a command's options, a file or stdin.

A text gives the same tokens from each of them: a byte order mark is dropped, lines end in
LF, and a prompt has one BOS token at most.

Not covered: the messages of a conversation (`conversation.py`) and of a request.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import DEFAULT_PROMPT

from ..bundled import DEFAULT, OPENING
from ..checkpoint.files import open_regular
from ..errors import InputError, reading, say
from ..model.scaled_model import scaled

# Tokens of a pass below which a GPU computes fewer tokens a second.
_SMALLEST_PASS = 256


def encode_prompt(args: argparse.Namespace, tokenizer: Any, *, continues: bool) -> list[int]:
    """Return the tokens of the prompt that the options describe.

    Args:
        args: the parsed options.
        tokenizer: mlx-lm's wrapper.
        continues: a saved cache holds the beginning of the conversation.

    Raises:
        InputError: no text, or a file that cannot be read.
    """
    text = prompt_text(args)
    if not text.strip():
        raise InputError("The prompt is empty; give a text with --prompt or --prompt-file.")
    templated = not args.ignore_chat_template and tokenizer.has_chat_template
    if templated or continues:
        text = without_bos(tokenizer, text)
    if templated:
        text = _apply_template(args, tokenizer, text, continues)
    tokens = encode_text(tokenizer, text, begins=not (templated or continues))
    if not tokens:
        raise InputError(
            "The tokenizer makes no tokens of the prompt: are its files missing in the model's "
            "folder?"
        )
    return tokens


def encode_text(tokenizer: Any, text: str, *, begins: bool) -> list[int]:
    """Return the tokens of a text.

    Args:
        tokenizer: mlx-lm's wrapper.
        text: may begin with the BOS text itself.
        begins: the text is bare and begins a sequence, so the tokenizer adds its special
            tokens. False for a rendered chat template, which has its own, and for text
            that follows other tokens.
    """
    bare = without_bos(tokenizer, text) if begins else text
    # Not verbose: its warning names max_position_embeddings, which a scaling exceeds.
    tokens = list(tokenizer.encode(bare, add_special_tokens=begins, verbose=False))
    if bare != text and tokens[:1] != [tokenizer.bos_token_id]:
        tokens.insert(0, tokenizer.bos_token_id)  # asked for, of a tokenizer that adds none
    return tokens


def without_bos(tokenizer: Any, text: str) -> str:
    """Return the text without BOS texts at its beginning.

    For text that stands behind a BOS token already: in a chat template or after a cache.
    """
    while tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text.removeprefix(tokenizer.bos_token)
    return text


def cap_max_tokens(model: nn.Module, prompt_length: int, max_tokens: int) -> int:
    """Return the number of tokens that can be generated without crossing a hard reach.

    Args:
        model: from `load`.
        prompt_length: of the text before them, tokens.
        max_tokens: how many are wanted, -1 for no limit.

    Raises:
        InputError: the prompt leaves no room for a single one.
    """
    room = scaled(model).room_after(prompt_length, "The prompt")
    if room is None or 0 < max_tokens <= room:
        return max_tokens
    say(f"Generating at most {room} tokens: the model reaches {prompt_length + room}.")
    return room


def pass_size(total: int, limit: int) -> int:
    """Return the tokens to read in one pass, so that a progress bar moves on the way.

    Args:
        total: tokens to read.
        limit: --prefill-step-size.
    """
    return min(limit, max(_SMALLEST_PASS, math.ceil(total / 8)))


def prompt_text(args: argparse.Namespace) -> str:
    """Return the text that --prompt and --prompt-file give.

    Raises:
        InputError: a file that cannot be read, or is no UTF-8.
    """
    message = args.prompt
    if message is not None:
        message = normalise_text(message.replace("\\n", "\n").replace("\\t", "\t"))
    if args.prompt_file is None:
        if message is None:
            message = OPENING if args.model == DEFAULT else DEFAULT_PROMPT
        return _read_stdin() if message == "-" else message
    if message == "-" and args.prompt_file == "-":
        raise InputError("--prompt - and --prompt-file - both read stdin; give one of them.")
    if args.prompt_file == "-":
        document = _read_stdin()
    else:
        document = read_text(args.prompt_file, "--prompt-file ")
    if message is None:
        return document
    return f"{document}\n\n{_read_stdin() if message == '-' else message}"


def read_text(file: str | Path, option: str = "") -> str:
    """Return the text of a UTF-8 file; see `normalise_text`.

    Args:
        file: its path; ~ stands for the home folder.
        option: put before the path in an error.

    Raises:
        InputError: the file cannot be read, or is no UTF-8.
    """
    path = Path(file).expanduser()
    try:
        with open_regular(path, pipe=True) as source:
            data = source.read()
    except InputError as error:
        raise InputError(f"{option}{path} cannot be read: it is not a file.") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{option}{path} cannot be read: {reason}.") from error
    return _decode(data, f"{option}{path}")


def normalise_text(text: str) -> str:
    """Return the text without a byte order mark, with lines that end in LF."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _read_stdin() -> str:
    return _decode(sys.stdin.buffer.read(), "The text on stdin")


def _decode(data: bytes, what: str) -> str:
    try:
        return normalise_text(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is no UTF-8 text: {error}. Save it as UTF-8.") from error


def _apply_template(args: argparse.Namespace, tokenizer: Any, text: str, continues: bool) -> str:
    extra = template_options(args)
    messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    messages.append({"role": "user", "content": text})
    prefilled = args.prefill_response is not None
    if prefilled:
        messages.append({"role": "assistant", "content": args.prefill_response})

    def render() -> str:
        return render_messages(
            tokenizer,
            messages,
            continue_final_message=prefilled,
            add_generation_prompt=not prefilled,
            **extra,
        )

    rendered = render()
    if not continues:
        return rendered
    # The cache ends where the user's message begins.
    messages[-2 if prefilled else -1]["content"] = "<query>"
    end = render().find("<query>")
    if end < 0:
        raise InputError(
            "This model's chat template drops the message. Give --ignore-chat-template."
        )
    return rendered[end:]


def render_messages(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """Return the text that a model's chat template makes of messages.

    Raises:
        InputError: the template does not take them. It is a stranger's program and may raise
            anything.
    """
    with reading("This model's chat template does not take the messages"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the variables that --chat-template-config gives to the chat template.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        return dict(json.loads(args.chat_template_config or "{}"))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--chat-template-config must be a JSON object, got {args.chat_template_config!r}."
        ) from error
