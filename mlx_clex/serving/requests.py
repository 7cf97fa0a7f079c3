"""Check a whole request before it is admitted.

`read_request` turns the body of a request into what mlx-lm's generation thread takes, or
raises a `RequestError`: nothing of a request reaches that thread unchecked, because an error
there ends every client's answer. `check_tokens` has the checks that need the loaded model.

Not covered: HTTP itself (`http.py`); prompts longer than the reach (`generation.py`).
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn
from mlx_lm import server as stock

from ..model.stock import config_value
from .fields import (
    CHOICES,
    INT,
    RequestError,
    boolean,
    check_tree,
    number,
    parse_json,
    same,
    shown,
    within,
    wrong,
)
from .messages import check_message, check_tools

BODY_LIMIT = 8_000_000  # bytes of a request; a million tokens are about 5 MB of text
_VARIABLES_LENGTH = 4000  # characters of a chat template's variables, as JSON
_STOPS, _STOP_LENGTH = 32, 256  # stop strings of a request, and characters of one

# Fields that would change the answer and are not implemented, with the values that ask for
# nothing. Other fields that nothing here reads are ignored, as mlx-lm does.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (({"type": "text"},), "answers cannot be held to a format"),
    "tool_choice": (("auto", "none"), "the model decides whether it calls a tool"),
    "best_of": ((1,), "answers are not ranked; ask for several with n"),
    "echo": ((False,), "the prompt is not repeated in the answer"),
    "suffix": (("",), "text is not inserted between a prompt and a suffix"),
    "functions": (([],), "use tools"),
    "function_call": (("auto", "none"), "use tools"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "web_search_options": ((), "nothing is fetched from the web"),
}
for _name in ("grammar", "json_schema", "guided_json", "guided_regex", "guided_choice"):
    _UNSUPPORTED[_name] = ((), "answers cannot be held to a format")

# Variables of chat templates that a request may set, besides those of --chat-template-args.
# Everything else is an argument of transformers' apply_chat_template, a template among them.
_TEMPLATE_VARIABLES = {
    "clear_thinking",
    "date_string",
    "enable_thinking",
    "preserve_thinking",
    "reasoning_effort",
    "thinking",
    "thinking_budget",
}


@dataclass(frozen=True)
class Served:
    """The models and adapters that a request may name; nothing else is looked at."""

    model: str | None  # that the server was started with
    adapter: str | None = None
    draft: str | None = None
    models: Sequence[str] = ()  # of --allow-model
    adapters: Sequence[str] = ()  # of --allow-adapters

    def find(self, body: Mapping[str, Any]) -> stock.ModelDescription:
        """Return the model, draft model and adapters of a request.

        Raises:
            RequestError: the server was not started with a model or adapters of that name.
        """
        model = self._named(body, "model", [self.model, *self.models]) or self.model
        if model is None:
            raise RequestError(
                "The server was started without --model, so a request must name one of "
                f"{', '.join(self.models)}.",
                param="model",
            )
        started = model == self.model
        draft = self._named(body, "draft_model", [self.draft])
        adapter = self._named(body, "adapters", [self.adapter, *self.adapters])
        return stock.ModelDescription(
            model=model,
            draft=draft or (self.draft if started else None),
            adapter=adapter or (self.adapter if started else None),
        )

    @staticmethod
    def _named(body: Mapping[str, Any], field: str, names: Sequence[str | None]) -> str | None:
        name = body.get(field)
        if name in (None, "default_model"):
            return None
        if not isinstance(name, str):
            raise wrong(field, "a text", name)
        if name not in names:
            option = "--allow-adapters" if field == "adapters" else "--allow-model"
            raise RequestError(
                f"{field} {shown(name)} is not served. The server's owner can allow a model "
                f"or adapters with {option}; GET /v1/models lists the models.",
                param=field,
                code="model_not_found",
                status=404,
            )
        return name


@dataclass(frozen=True)
class Request:
    """A checked request: one job for each answer that it asks for."""

    chat: bool
    stream: bool
    include_usage: bool  # in the last event of a stream
    model: str  # its name, for the answer
    tools: list[Any] | None
    logprobs: bool
    n: int  # answers to each prompt
    jobs: list[tuple[stock.CompletionRequest, stock.GenerationArguments]]


def read_request(data: bytes, *, chat: bool, served: Served, defaults: Any) -> Request:
    """Check the body of a request, and return what it asks for.

    Args:
        data: JSON.
        chat: for chat completions; otherwise for completions.
        served: what may be asked.
        defaults: the server's arguments, whose values stand for those that are not given.

    Raises:
        RequestError: the message says which field is wrong, and what is allowed.
    """
    body = parse_json(data, "The request body")
    check_tree(body)
    if not isinstance(body, dict):
        raise RequestError(f"The request body must be a JSON object, got {shown(body)}.")
    body = {name: value for name, value in body.items() if value is not None}
    for name, (harmless, reason) in _UNSUPPORTED.items():
        if name in body and not any(same(body[name], value) for value in harmless):
            allowed = "".join(f", or give {shown(value)}" for value in harmless[:1])
            raise RequestError(
                f"{name} {shown(body[name])} is not supported: {reason}. Leave it out{allowed}.",
                param=name,
            )
    description = served.find(body)
    stream = boolean(body, "stream")
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise wrong("stream_options", "an object", options)
    n = number(body, "n", 1)
    requests = _chat_requests(body) if chat else _text_requests(body)
    if len(requests) * n > CHOICES:
        raise RequestError(
            f"A request may ask for {CHOICES} answers, got {len(requests)} prompts x n {n}.",
            param="n",
        )
    args = _generation_arguments(body, chat, description, defaults)
    fixed = args.seed not in (None, -1)  # -1, as llama.cpp and vLLM have it: another each time
    seeds = [(args.seed + i) % (1 << 63) if fixed else None for i in range(n)]
    return Request(
        chat=chat,
        stream=stream,
        include_usage=boolean(options, "include_usage"),
        model=description.model,
        tools=requests[0].tools,
        logprobs=args.logprobs,
        n=n,
        # Copies: the most tokens of an answer is lowered to what the reach has room for.
        jobs=[
            (replace(request), replace(args, seed=seed)) for request in requests for seed in seeds
        ],
    )


def check_tokens(model: nn.Module | None, tokenizer: Any, prompt: Sequence[int], args: Any) -> None:
    """Refuse tokens that do not exist, which MLX and mlx-lm do not check.

    Raises:
        RequestError: a token that does not exist, or more of them than there are.
    """
    vocabulary = None if model is None else config_value(model, "vocab_size")
    if vocabulary is None:
        return
    if not all(0 <= token < vocabulary for token in (min(prompt), max(prompt))):
        raise RequestError(
            f"The prompt has token {max(prompt)}; the model's are 0..{vocabulary - 1}.",
            param="prompt",
        )
    known = min(vocabulary, len(tokenizer))
    for token in args.logits.logit_bias or {}:
        if token >= known or tokenizer.convert_ids_to_tokens(token) is None:
            raise RequestError(
                f"logit_bias has token {token}; there are {known}.", param="logit_bias"
            )
    for name, value in (("top_k", args.sampling.top_k), ("top_logprobs", args.top_logprobs)):
        if value >= vocabulary:
            raise RequestError(
                f"{name} must be below {vocabulary}, the number of tokens.", param=name
            )


def _text_requests(body: Mapping[str, Any]) -> list[stock.CompletionRequest]:
    """Return one request for each prompt: text or token ids, one or a list of them."""
    prompt = body.get("prompt")
    prompts: list[Any] = [prompt]
    if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
        prompts = prompt
    kinds = {type(each) for each in prompts}
    if (
        prompt == []
        or not kinds <= {str, list}
        or len(kinds) > 1
        or any(kinds == {list} and not _are_ids(each) for each in prompts)
    ):
        raise wrong("prompt", "a text, a list of token ids, or a list of either", prompt)
    return [stock.CompletionRequest("text", each, [], None, None) for each in prompts]


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(token) is int and 0 <= token < INT for token in value)


def _chat_requests(body: Mapping[str, Any]) -> list[stock.CompletionRequest]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "a list of at least one message", messages)
    tools = body.get("tools")
    if tools is not None:
        check_tools(tools)
    if body.get("tool_choice") == "none":
        tools = None
    roles = body.get("role_mapping")
    if roles is not None and not (
        isinstance(roles, dict) and all(isinstance(role, str) for role in roles.values())
    ):
        raise wrong("role_mapping", "an object whose values are texts", roles)
    checked = [check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    return [stock.CompletionRequest("chat", "", checked, tools or None, roles)]


def _generation_arguments(
    body: Mapping[str, Any], chat: bool, description: stock.ModelDescription, defaults: Any
) -> stock.GenerationArguments:
    logprobs, top_logprobs = _logprobs(body, chat)
    get = functools.partial(number, body)
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"

    return stock.GenerationArguments(
        model=description,
        sampling=stock.SamplingArguments(
            temperature=get("temperature", defaults.temp),
            top_p=get("top_p", defaults.top_p),
            top_k=get("top_k", defaults.top_k),
            min_p=get("min_p", defaults.min_p),
            xtc_probability=get("xtc_probability", 0.0),
            xtc_threshold=get("xtc_threshold", 0.1),
        ),
        logits=stock.LogitsProcessorArguments(
            logit_bias=_logit_bias(body),
            repetition_penalty=get("repetition_penalty", 0.0),
            repetition_context_size=get("repetition_context_size", 20),
            presence_penalty=get("presence_penalty", 0.0),
            presence_context_size=get("presence_context_size", 20),
            frequency_penalty=get("frequency_penalty", 0.0),
            frequency_context_size=get("frequency_context_size", 20),
        ),
        stop_words=_stop_strings(body),
        max_tokens=get(limit, defaults.max_tokens, like="max_tokens"),
        num_draft_tokens=get("num_draft_tokens", defaults.num_draft_tokens),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        seed=get("seed", None),
        chat_template_kwargs=_template_variables(body, defaults.chat_template_args),
    )


def _logprobs(body: Mapping[str, Any], chat: bool) -> tuple[bool, int]:
    """Return whether log-probabilities are wanted, and those of how many likeliest tokens.

    Completions may give that number as `logprobs`, which is OpenAI's way.
    """
    top = number(body, "top_logprobs", 0)
    if not chat and type(body.get("logprobs")) is int:
        return True, max(top, number(body, "logprobs", 0, like="top_logprobs"))
    return boolean(body, "logprobs") or top > 0, top


def _stop_strings(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop", [])
    strings = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(strings, list)
        or len(strings) > _STOPS
        or not all(isinstance(each, str) and 0 < len(each) <= _STOP_LENGTH for each in strings)
    ):
        wanted = f"a text of 1..{_STOP_LENGTH} characters, or a list of up to {_STOPS} of them"
        raise wrong("stop", wanted, stop)
    return strings


def _logit_bias(body: Mapping[str, Any]) -> dict[int, float] | None:
    biases = body.get("logit_bias")
    if biases is None:
        return None
    if not isinstance(biases, dict) or not all(
        token.isascii() and token.isdigit() and len(token) < 10 and within(bias, float, -1e6, 1e6)
        for token, bias in biases.items()
    ):
        raise wrong("logit_bias", "an object of token ids and numbers within -1e6..1e6", biases)
    return {int(token): float(bias) for token, bias in biases.items()}


def _template_variables(body: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
    variables = body.get("chat_template_kwargs")
    if variables is None:
        return None
    allowed = sorted(_TEMPLATE_VARIABLES | given.keys())
    if not isinstance(variables, dict) or not variables.keys() <= set(allowed):
        wanted = f"an object with these keys only: {', '.join(allowed)}"
        raise wrong("chat_template_kwargs", wanted, variables)
    if len(json.dumps(variables)) > _VARIABLES_LENGTH:
        wanted = f"an object of at most {_VARIABLES_LENGTH} characters"
        raise wrong("chat_template_kwargs", wanted, variables)
    return variables
