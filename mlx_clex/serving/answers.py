"""OpenAI's objects: answers, events of a stream, errors.

Not covered: how they are sent (`http.py`).
"""

import contextlib
import json
import logging
import time
import uuid
from typing import Any

from mlx_lm import server as stock

from .answer_text import AnswerText, Parts
from .requests import Request

_LOWEST = -9999.0  # what OpenAI writes for a log-probability of minus infinity


def error_object(
    message: str, *, status: int = 500, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the body of an answer that is an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _as_json(arguments: Any) -> str:
    """Return arguments of a tool call as OpenAI's text; some models write that text already."""
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            json.loads(arguments)
            return arguments
    return json.dumps(arguments, ensure_ascii=False)


class Choice:
    """One answer on its way: what generation gave and the client does not have yet."""

    def __init__(self, index: int, context: Any, request: Request) -> None:
        """`context`: mlx-lm's, whose `text_sm` is our `AnswerText`."""
        self.index = index
        self.context = context
        self.tokens = 0  # generated
        self.finish_reason: str | None = None
        self._answer: AnswerText = context.text_sm
        self._wants_logprobs = request.logprobs
        self._request = request
        self._call: str | None = None  # text of a tool call that has not ended yet
        self._called = 0  # tool calls so far
        self._clear()

    def _clear(self) -> None:
        self.text = ""
        self.reasoning = ""
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, response: stock.Response) -> None:
        """Add a token that generation made."""
        self.tokens += 1
        self._read(self._answer.take())
        if self._wants_logprobs:
            self._logprobs.append(self._logprob(response))
        if response.finish_reason is not None:
            self._read(self._answer.finish())
            self._end_call()
            calls = self._called and response.finish_reason == "stop"
            self.finish_reason = "tool_calls" if calls else response.finish_reason

    def _read(self, parts: Parts) -> None:
        for state, text in parts:
            if state == "tool":
                self._call = (self._call or "") + text
            elif state == "reasoning":
                self.reasoning += text
            elif state == "normal":
                self._end_call()
                self.text += text

    def _end_call(self) -> None:
        """Add the tool call that ended; as text, if it cannot be read."""
        if self._call:
            try:
                self._calls += self._format(self._call)
            except Exception as error:
                # A model writes whatever it likes, and mlx-lm's parsers raise whatever they like.
                logging.warning("A tool call cannot be read: %s: %s", type(error).__name__, error)
                self.text += self._call
        self._call = None

    def _format(self, text: str) -> list[dict[str, Any]]:
        """Return OpenAI's tool calls of a text; some parsers find several in one."""
        parsed = self.context.tool_parser(text, self._request.tools)
        found = parsed if isinstance(parsed, list) else [parsed]
        if not found or not all(
            isinstance(call, dict) and isinstance(call.get("name"), str) for call in found
        ):
            raise ValueError("it is no object with a name")
        calls: list[dict[str, Any]] = []
        for call in found:
            given = (call.get(name) for name in ("arguments", "parameters"))
            arguments: Any = next((value for value in given if value is not None), {})
            calls.append(
                {
                    "function": {"name": call["name"], "arguments": _as_json(arguments)},
                    "type": "function",
                    "id": str(call.get("id") or uuid.uuid4()),
                }
            )
            if self._request.stream:
                calls[-1]["index"] = self._called + len(calls) - 1
        self._called += len(calls)
        return calls

    def _logprob(self, response: stock.Response) -> dict[str, Any]:
        token = self._answer.tokenizer.convert_ids_to_tokens(response.token)
        own = {"id": response.token, "token": token, "logprob": response.logprob}
        own, *top = ({**each, "bytes": None} for each in (own, *response.top_tokens))
        for each in (own, *top):
            each["logprob"] = max(_LOWEST, each["logprob"])
            each["token"] = each["token"] or ""
        return {**own, "top_logprobs": sorted(top, key=lambda each: -each["logprob"])}

    @property
    def news(self) -> bool:
        """Whether a stream has something to send."""
        return bool(self.text or self.reasoning or self._calls or self.finish_reason)

    def take(self, request: Request) -> dict[str, Any]:
        """Return what is new as OpenAI's choice: of a stream, or the whole answer."""
        choice: dict[str, Any] = {
            "index": self.index,
            "finish_reason": self.finish_reason,
            "logprobs": self._all_logprobs(request.chat) if self._logprobs else None,
        }
        if request.chat:
            message: dict[str, Any] = {"role": "assistant"}
            if self.text or not request.stream:
                message["content"] = self.text or None
            if self.reasoning:
                message["reasoning"] = self.reasoning
            if self._calls:
                message["tool_calls"] = self._calls
            choice["delta" if request.stream else "message"] = message
        else:
            choice["text"] = self.text
        self._clear()
        return choice

    def _all_logprobs(self, chat: bool) -> dict[str, Any]:
        """Return the log-probabilities of the new tokens; completions have lists as well."""
        content = self._logprobs
        if chat:
            return {"content": content}
        return {
            "content": content,
            "tokens": [each["token"] for each in content],
            "token_logprobs": [each["logprob"] for each in content],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in content
            ],
        }


class Answer:
    """The choices of one request, and the object around them, the same for all events."""

    def __init__(self, request: Request, fingerprint: str) -> None:
        """`fingerprint`: of the system."""
        self._request = request
        self._choices: dict[int, Choice] = {}
        kind = "chat.completion" if request.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4()}",
            "object": f"{kind}.chunk" if request.chat and request.stream else kind,
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint,
        }

    def add(self, index: int, item: Any) -> Choice:
        """Add what a job yielded, and return its choice; the context begins the choice."""
        if isinstance(item, stock.GenerationContext):
            self._choices[index] = Choice(index, item, self._request)
        elif isinstance(item, stock.Response):
            self._choices[index].add(item)
        return self._choices[index]

    def event(self, choice: Choice) -> dict[str, Any]:
        """Return an event of a stream with what is new in one choice."""
        return {**self._head, "choices": [choice.take(self._request)]}

    def usage_event(self) -> dict[str, Any]:
        """Return the last event of a stream that asked for it."""
        return {**self._head, "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """Return the answer to a request without a stream."""
        taken = [choice.take(self._request) for choice in self._in_order()]
        return {**self._head, "choices": taken, "usage": self._usage()}

    def _in_order(self) -> list[Choice]:
        return [self._choices[index] for index in sorted(self._choices)]

    def _usage(self) -> dict[str, Any]:
        """Count tokens; a prompt counts once, however many answers it gets."""
        choices = self._in_order()
        firsts = choices[:: self._request.n]
        prompt = sum(len(choice.context.prompt) for choice in firsts)
        generated = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {
                "cached_tokens": sum(max(0, choice.context.prompt_cache_count) for choice in firsts)
            },
        }
