"""From the options of a command to the tokens of a prompt.

Not covered: the messages of a conversation (`conversation.py`) and of a request.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import DEFAULT_PROMPT

from ..bundled import DEFAULT, OPENING
from ..errors import InputError, say
from ..model.scaled_model import scaled


def encode_prompt(args: argparse.Namespace, tokenizer: Any, *, continues: bool) -> list[int]:
    """The tokens of the prompt that the options describe.

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
    if templated:
        text = _apply_template(args, tokenizer, text, continues)
    tokens = tokenizer.encode(text, add_special_tokens=not (templated or continues))
    if not tokens:
        raise InputError(
            "The tokenizer makes no tokens of the prompt: are its files missing in the model's "
            "folder?"
        )
    return tokens


def cap_max_tokens(model: nn.Module, prompt_length: int, max_tokens: int) -> int:
    """The tokens that can be generated without crossing a hard reach.

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


def prompt_text(args: argparse.Namespace) -> str:
    """What --prompt and --prompt-file say.

    Raises:
        InputError: a file that cannot be read, or is no UTF-8.
    """
    message = args.prompt
    if message is not None:
        message = message.replace("\\n", "\n").replace("\\t", "\t")
    if args.prompt_file is None:
        if message is None:
            message = OPENING if args.model == DEFAULT else DEFAULT_PROMPT
        return _read_stdin() if message == "-" else message
    if message == "-" and args.prompt_file == "-":
        raise InputError("--prompt - and --prompt-file - both read stdin; give one of them.")
    document = _read_stdin() if args.prompt_file == "-" else _read_file(Path(args.prompt_file))
    if message is None:
        return document
    return f"{document}\n\n{_read_stdin() if message == '-' else message}"


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {path} is no UTF-8 text: {error}.") from error
    except OSError as error:
        raise InputError(f"--prompt-file {path} cannot be read: {error.strerror}.") from error


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"The text on stdin is no UTF-8: {error}.") from error


def _apply_template(args: argparse.Namespace, tokenizer: Any, text: str, continues: bool) -> str:
    extra = template_options(args)
    messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    messages.append({"role": "user", "content": text})
    prefilled = args.prefill_response is not None
    if prefilled:
        messages.append({"role": "assistant", "content": args.prefill_response})

    def render() -> str:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=prefilled,
            add_generation_prompt=not prefilled,
            **extra,
        )

    rendered = render()
    if not continues:
        return rendered
    # The cache ends where the user's message begins.
    messages[-2 if prefilled else -1]["content"] = "<query>"
    return rendered[render().index("<query>") :]


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    try:
        return dict(json.loads(args.chat_template_config or "{}"))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--chat-template-config must be a JSON object, got {args.chat_template_config!r}."
        ) from error
