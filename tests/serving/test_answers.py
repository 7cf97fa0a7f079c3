"""Reasoning, tool calls and log-probabilities in OpenAI's objects."""

import json
import math
from types import SimpleNamespace

import pytest
from mlx_lm.server import Response

from mlx_clex.serving.answers import Choice

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def parse(text, tools):
    """A tool parser of mlx-lm: a ValueError where the text was cut off."""
    assert tools == TOOLS
    return {"name": "f", "arguments": json.loads(text)}


class Text:
    """Gives the parts of each token, as AnswerText does."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)
        self.tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda token: None)

    def take(self):
        return self.tokens.pop(0)

    def finish(self):
        return []


def choices_of(parts, stream, finish="stop", parser=parse, **response):
    """OpenAI's choices, as they would be sent."""
    request = SimpleNamespace(chat=True, stream=stream, tools=TOOLS, logprobs=bool(response))
    context = SimpleNamespace(tool_parser=parser, text_sm=Text(*parts))
    choice = Choice(0, context, request)
    sent = []
    for i in range(len(parts)):
        ending = finish if i == len(parts) - 1 else None
        choice.add(Response("", i, response.get("logprob", -1.0), ending, response.get("top", ())))
        if choice.news and (stream or ending):
            sent.append(choice.take(request))
    return sent


PARTS = [
    [("reasoning", "hm")],
    [("reasoning", "m"), ("normal", "a")],
    [("tool", '{"x":')],
    [("tool", "1}"), ("normal", "")],
    [("tool", '{"x": 2}')],
    [],
]


def test_a_whole_answer_with_reasoning_and_tool_calls():
    """The answer ended for the calls, not because the text was complete."""
    (choice,) = choices_of(PARTS, stream=False)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning"]) == ("a", "hmm")
    calls = [call["function"] for call in message["tool_calls"]]
    assert calls == [{"name": "f", "arguments": f'{{"x": {i}}}'} for i in (1, 2)]


def test_a_stream_with_reasoning_and_tool_calls():
    """Each call once, with its index, when it is complete."""
    sent = choices_of(PARTS, stream=True)
    deltas = [choice["delta"] for choice in sent]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "hmm"
    assert "".join(delta.get("content", "") for delta in deltas) == "a"
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]["arguments"]) for call in calls] == [
        (0, '{"x": 1}'),
        (1, '{"x": 2}'),
    ]
    assert [choice["finish_reason"] for choice in sent][-1] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "finish"),
    [('{"x":', "length"), ('{"x": 1', "stop"), ("[]", "stop"), ('["f"]', "stop"), ('"f"', "stop")],
)
def test_a_tool_call_that_cannot_be_read_is_text(text, finish, stream):
    """The whole answer was lost with HTTP 500, or it ended for calls that it did not have."""
    parts = [[("normal", "a ")], [("tool", text)], [("normal", " b")]]
    sent = choices_of(parts, stream, finish, parser=lambda text, tools: json.loads(text))
    messages = [choice["delta" if stream else "message"] for choice in sent]
    assert not any("tool_calls" in message for message in messages)
    assert "".join(message.get("content", "") for message in messages) == f"a {text} b"
    assert sent[-1]["finish_reason"] == finish


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "parameters": {"x": "ä"}}', '{"x": "ä"}'),
        (r'{"name": "f", "arguments": "{\"x\": 1}"}', '{"x": 1}'),
        ('{"name": "f", "arguments": "x"}', '"x"'),
    ],
)
def test_arguments_are_json_however_the_model_wrote_them(text, arguments):
    """Calls without any were lost with HTTP 500; those in a string were encoded twice."""
    parts = [[("normal", "a")], [("tool", text)], [("tool", "")]]
    (choice,) = choices_of(parts, stream=False, parser=lambda text, tools: json.loads(text))
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": arguments}
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a", "tool_calls")


def test_a_call_that_can_be_read_stands_beside_one_that_cannot():
    """Both were lost."""
    parts = [[("tool", "{")], [("normal", "")], [("tool", '{"x": 1}')]]
    (choice,) = choices_of(parts, stream=False)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"x": 1}'
    assert (choice["message"]["content"], choice["finish_reason"]) == ("{", "tool_calls")


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_log_probabilities_are_numbers_of_json(value):
    """-Infinity is no JSON, and a token without a text is null in mlx-lm's answer."""
    top = ({"id": 5, "token": None, "logprob": value}, {"id": 6, "token": "b", "logprob": -0.5})
    (choice,) = choices_of([[("normal", "a")]], stream=False, logprob=value, top=top)
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["logprob"]) == ("", -9999.0)
    assert [(each["token"], each["logprob"]) for each in entry["top_logprobs"]] == [
        ("b", -0.5),
        ("", -9999.0),
    ]
    json.dumps(choice, allow_nan=False)
