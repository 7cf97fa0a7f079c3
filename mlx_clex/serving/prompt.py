"""The tokens of a prompt, from a command's options, a file or stdin.

A text gives the same tokens from each of them (`data/text.py`).

Not covered: the messages of a conversation (`conversation.py`) and of a request.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import DEFAULT_PROMPT

from ..bundled import DEFAULT, OPENING
from ..data.text import (
    TextTokenizer,
    decode_text,
    encode_text,
    normalise_text,
    read_text,
    without_bos,
)
from ..errors import InputError, reading, say
from ..model.scaled_model import scaled

# Arguments of `apply_chat_template` that are no variables of the template.
_RESERVED = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    )
)
# Tokens of a pass below which a GPU computes fewer tokens a second.
_SMALLEST_PASS = 256


def say_if_past_training(model: nn.Module, length: int) -> None:
    """Say that a prompt is longer than a plain model was trained on; others warn by themselves."""
    plain = scaled(model)
    if plain.scaling is None and plain.reach is not None and length > plain.reach:
        say(
            f"The text has {length} tokens, and this model was trained on {plain.reach}; answers "
            "get worse."
        )


def encode_prompt(
    args: argparse.Namespace, tokenizer: Any, *, continues: bool, limit: int | None = None
) -> list[int]:
    """Return the tokens of the prompt that the options describe.

    Args:
        args: the parsed options.
        tokenizer: mlx-lm's wrapper.
        continues: a saved cache holds the beginning of the conversation.
        limit: of the model, in tokens.

    Raises:
        InputError: no text, or a file that cannot be read.
    """
    text = prompt_text(args)
    if not text.strip():
        raise InputError("The prompt is empty; give a text with --prompt or --prompt-file.")
    templated = not args.ignore_chat_template and tokenizer.has_chat_template
    for name in () if templated else ("system_prompt", "prefill_response"):
        if getattr(args, name):
            why = (
                "--ignore-chat-template leaves it out"
                if args.ignore_chat_template
                else "this model's tokenizer has none"
            )
            raise InputError(
                f"--{name.replace('_', '-')} needs a chat template, and {why}. Leave it out."
            )
    if templated or continues:
        text = without_bos(tokenizer, text)
    if templated:
        text = _apply_template(args, tokenizer, text, continues)
    begins = not (templated or continues)
    tokens = encode_text(tokenizer, text, begins=begins, limit=limit)
    if not tokens:
        raise InputError(
            "The tokenizer makes no tokens of the prompt: are its files missing in the model's "
            "folder?"
        )
    return tokens


def cap_max_tokens(
    model: nn.Module, prompt_length: int, max_tokens: int, *, draft: bool = False
) -> int:
    """Return the number of tokens that can be generated without crossing a hard reach.

    Args:
        model: from `load`.
        prompt_length: of the text before them, tokens.
        max_tokens: how many are wanted, -1 for no limit.
        draft: it is the draft model.

    Raises:
        InputError: the prompt leaves no room for a single one.
    """
    what = "The draft model cannot read the prompt: it" if draft else "The prompt"
    room = scaled(model).room_after(prompt_length, what)
    if room is None or 0 < max_tokens <= room:
        return max_tokens
    name = "the draft model" if draft else "the model"
    say(f"Generating at most {room} tokens: {name} reaches {prompt_length + room}.")
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


def _read_stdin() -> str:
    return decode_text(sys.stdin.buffer.read(), "The text on stdin")


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
        return TextTokenizer(tokenizer).apply_chat_template(messages, tokenize=False, **options)


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the variables that --chat-template-config gives to the chat template.

    Raises:
        InputError: it is no JSON object, or has a key that is no variable of a template.
    """
    try:
        variables = dict(json.loads(args.chat_template_config or "{}"))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--chat-template-config must be a JSON object, got {args.chat_template_config!r}."
        ) from error
    check_variables(variables, "--chat-template-config")
    return variables


def check_variables(variables: Mapping[str, Any], option: str) -> None:
    """Refuse variables of a chat template that would replace an argument of its call.

    Raises:
        InputError: the message names the first one and the option.
    """
    for name in sorted(_RESERVED & variables.keys()):
        raise InputError(
            f"{option} has {name!r}, which is no variable of a chat template: mlx_clex sets it "
            "itself. Leave it out."
        )
