"""What a request holds is checked wholly before it is admitted."""

import argparse
import json

import pytest

from mlx_clex.server import add_arguments
from mlx_clex.serving.fields import RequestError
from mlx_clex.serving.requests import Served, read_request

SERVED = Served("m", "own", "draft", ["other"], ["theirs"])
parser = argparse.ArgumentParser()
add_arguments(parser)
DEFAULTS = parser.parse_args(["--chat-template-args", '{"mood": "calm"}'])


def read(body, chat=False):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_request(data, chat=chat, served=SERVED, defaults=DEFAULTS)


def arguments(**fields):
    """The generation arguments of the only job of a completion request."""
    ((_, args),) = read({"prompt": "a", **fields}).jobs
    return args


def user(content):
    return [{"role": "user", "content": content}]


def call(arguments):
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "c", "type": "function", "function": function}]
    return [*user("hi"), {"role": "assistant", "content": None, "tool_calls": calls}]


COMPLETIONS = {
    "no JSON": (b"{", None),
    "no object": (b"[1]", None),
    "no UTF-8": (b"\xff\xfe\x00", None),
    "an empty body": (b"", None),
    "a number that JSON does not have": (b'{"prompt": "a", "temperature": NaN}', None),
    "an integer of 5,000 digits": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", None),
    "an integer of 4,000 digits": (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", "seed"),
    "a float beyond floats": (b'{"prompt": "a", "unknown": 1e999}', "unknown"),
    "nested without end": (b"[" * 200_000, None),
    "nested beyond recursion": (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "prompt"),
    "half of a surrogate pair": (b'{"prompt": "\\ud800"}', "prompt"),
    "half of a pair as a key": (b'{"prompt": "a", "x": {"\\udfff": 1}}', "x"),
    "half of a pair in stop": (b'{"prompt": "a", "stop": ["\\ud83d"]}', "stop"),
    "no prompt": ({}, "prompt"),
    "prompt null": ({"prompt": None}, "prompt"),
    "prompt a number": ({"prompt": 5}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "a prompt without ids": ({"prompt": [[]]}, "prompt"),
    "text and ids": ({"prompt": ["a", [1]]}, "prompt"),
    "true among ids": ({"prompt": [1, True]}, "prompt"),
    "a negative id": ({"prompt": [-1]}, "prompt"),
    "an id beyond integers": ({"prompt": [1 << 70]}, "prompt"),
    "too many answers": ({"prompt": ["a"] * 65, "n": 2}, "n"),
    "n of 0": ({"n": 0}, "n"),
    "negative max_tokens": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens of 0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "negative temperature": ({"temperature": -1}, "temperature"),
    "temperature beyond floats": ({"temperature": 2**70}, "temperature"),
    "a text for a number": ({"top_p": "all"}, "top_p"),
    "true for a number": ({"temperature": True}, "temperature"),
    "true for an integer": ({"max_tokens": True}, "max_tokens"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens"),
    "top_logprobs true": ({"top_logprobs": True}, "top_logprobs"),
    "too many top_logprobs": ({"top_logprobs": 21}, "top_logprobs"),
    "logprobs a text": ({"logprobs": "yes"}, "logprobs"),
    "a seed of 65 bits": ({"seed": -1 - (1 << 63)}, "seed"),
    "stream a number": ({"stream": 1}, "stream"),
    "stream_options a list": ({"stream_options": []}, "stream_options"),
    "include_usage a text": ({"stream_options": {"include_usage": "no"}}, "include_usage"),
    "stop a number": ({"stop": 5}, "stop"),
    "stop true": ({"stop": True}, "stop"),
    "stop of numbers": ({"stop": [5]}, "stop"),
    "stop of null": ({"stop": [None]}, "stop"),
    "stop of objects": ({"stop": [{}]}, "stop"),
    "an empty stop": ({"stop": ["a", ""]}, "stop"),
    "a long stop": ({"stop": "a" * 257}, "stop"),
    "many stops": ({"stop": ["a"] * 33}, "stop"),
    "logit_bias null": ({"logit_bias": {"5": None}}, "logit_bias"),
    "logit_bias true": ({"logit_bias": {"5": True}}, "logit_bias"),
    "logit_bias a list": ({"logit_bias": [5]}, "logit_bias"),
    "a bias for a word": ({"logit_bias": {"five": 1}}, "logit_bias"),
    "a bias for a digit of another script": ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
    "a bias beyond floats": ({"logit_bias": {"5": 1 << 2000}}, "logit_bias"),
    "a response format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a grammar": ({"grammar": "root ::= 'a'"}, "grammar"),
    "best_of": ({"best_of": 2}, "best_of"),
    "echo": ({"echo": True}, "echo"),
    "model a number": ({"model": 5}, "model"),
}
CHATS = {
    "no messages": ({}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "messages a text": ({"messages": "hi"}, "messages"),
    "a message a text": ({"messages": ["hi"]}, "messages"),
    "no role": ({"messages": [{"content": "hi"}]}, "messages"),
    "role a number": ({"messages": [{"role": 5, "content": "hi"}]}, "messages"),
    "content a number": ({"messages": user(5)}, "messages"),
    "a part a text": ({"messages": user(["hi"])}, "messages"),
    "a part without text": ({"messages": user([{"type": "text"}])}, "messages"),
    "an image": (
        {"messages": user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1"}}])},
        "messages",
    ),
    "an image beside text": (
        {"messages": user([{"type": "text", "text": "hi"}, {"type": "image", "image": "x"}])},
        "messages",
    ),
    "tool arguments cut off": ({"messages": call("{")}, "messages"),
    "tool arguments a list": ({"messages": call("[]")}, "messages"),
    "tool arguments with half of a pair": ({"messages": call('{"a": "\\ud800"}')}, "messages"),
    "a tool call without a function": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]},
        "messages",
    ),
    "tool calls a text": ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "messages"),
    "tools a text": ({"messages": user("hi"), "tools": "f"}, "tools"),
    "a tool without a name": ({"messages": user("hi"), "tools": [{"function": {}}]}, "tools"),
    "a tool that must be called": (
        {"messages": user("hi"), "tool_choice": "required"},
        "tool_choice",
    ),
    "role_mapping of numbers": ({"messages": user("hi"), "role_mapping": {"a": 1}}, "role_mapping"),
    "a template": (
        {"messages": user("hi"), "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "chat_template_kwargs",
    ),
    "return_tensors": (
        {"messages": user("hi"), "chat_template_kwargs": {"return_tensors": "pt"}},
        "chat_template_kwargs",
    ),
    "tokenize": (
        {"messages": user("hi"), "chat_template_kwargs": {"tokenize": False}},
        "chat_template_kwargs",
    ),
    "template variables a list": (
        {"messages": user("hi"), "chat_template_kwargs": ["thinking"]},
        "chat_template_kwargs",
    ),
    "a template variable of a megabyte": (
        {"messages": user("hi"), "chat_template_kwargs": {"date_string": "a" * 1_000_000}},
        "chat_template_kwargs",
    ),
}


@pytest.mark.parametrize("kind", [*COMPLETIONS, *CHATS])
def test_a_wrong_request_is_refused_with_its_field(kind):
    """Most of these ended the answers of all clients, with HTTP 200 and no error."""
    body, param = (COMPLETIONS | CHATS)[kind]
    if isinstance(body, dict) and kind in COMPLETIONS and not {"prompt"} & body.keys():
        body = body if kind == "no prompt" else {"prompt": "a", **body}
    with pytest.raises(RequestError) as error:
        read(body, chat=kind in CHATS)
    assert (error.value.status, error.value.param) == (400, param), error.value
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_every_kind_of_prompt_of_the_api(prompt, prompts):
    """A list of prompts ended all answers under way."""
    request = read({"prompt": prompt, "n": 2, "seed": 5})
    assert [job.prompt for job, _ in request.jobs] == [each for each in prompts for _ in "12"]
    assert [args.seed for _, args in request.jobs] == [5, 6] * len(prompts)
    assert len({id(args) for _, args in request.jobs}) == 2 * len(prompts)


@pytest.mark.parametrize(
    ("seed", "seeds"), [(-1, [None, None]), (-2, [(1 << 63) - 2, (1 << 63) - 1])]
)
def test_negative_seeds(seed, seeds):
    """OpenAI allows them; -1 asks for another answer each time."""
    request = read({"prompt": "a", "n": 2, "seed": seed})
    assert [args.seed for _, args in request.jobs] == seeds


def test_null_stands_for_the_value_of_the_server():
    """OpenAI's clients send null for what their user did not set."""
    names = ["temperature", "max_tokens", "top_p", "seed", "stop", "logit_bias", "logprobs"]
    given, left_out = arguments(**dict.fromkeys(names)), arguments()
    assert given == left_out
    assert (given.max_tokens, given.stop_words, given.sampling.temperature) == (512, [], 0.0)


def test_values_reach_generation_as_they_were_given():
    """In mlx-lm's names and types."""
    args = arguments(
        max_tokens=9, max_completion_tokens=7, temperature=1, stop="x", logit_bias={"5": -3}
    )
    assert args.max_tokens == 7
    assert args.stop_words == ["x"]
    assert args.logits.logit_bias == {5: -3.0}
    assert isinstance(args.sampling.temperature, float)
    for fields, expected in [
        ({}, (False, 0)),
        ({"logprobs": True}, (True, 0)),
        ({"logprobs": 3}, (True, 3)),
        ({"logprobs": 0}, (True, 0)),
        ({"top_logprobs": 2}, (True, 2)),
    ]:
        args = arguments(**fields)
        assert (args.logprobs, args.top_logprobs) == expected


def test_messages_reach_the_template_as_texts():
    """Parts joined, arguments of tool calls parsed; other fields stay."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {
        "messages": [*user(parts), *call('{"x": 1}')[1:]],
        "tools": tools,
        "chat_template_kwargs": {"enable_thinking": False, "mood": "wild"},
    }
    ((job, args),) = read(body, chat=True).jobs
    assert job.messages[0] == {"role": "user", "content": "ab"}
    assert job.messages[1]["content"] == ""
    assert job.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert job.tools == tools
    assert args.chat_template_kwargs == {"enable_thinking": False, "mood": "wild"}
    ((job, _),) = read(body | {"tool_choice": "none"}, chat=True).jobs
    assert job.tools is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("m", "own", "draft")),
        ({"model": "default_model"}, ("m", "own", "draft")),
        ({"model": "m"}, ("m", "own", "draft")),
        ({"model": "m", "adapters": "theirs"}, ("m", "theirs", "draft")),
        ({"model": "other"}, ("other", None, None)),
        ({"model": "other", "adapters": "theirs"}, ("other", "theirs", None)),
    ],
)
def test_a_request_gets_the_model_that_it_names(fields, expected):
    """The started model answered without its adapters when it was named."""
    model = arguments(**fields).model
    assert (model.model, model.adapter, model.draft) == expected


@pytest.mark.parametrize("field", ["model", "adapters", "draft_model"])
@pytest.mark.parametrize("name", ["/etc", "other/../m", "m/", "someone/model", ""])
def test_nothing_else_is_looked_for(field, name):
    """A page could make the server read any folder, or load a model from the network."""
    with pytest.raises(RequestError, match="not served") as error:
        read({"prompt": "a", field: name})
    assert (error.value.status, error.value.code) == (404, "model_not_found")
    assert error.value.param == field


def test_without_a_model_a_request_must_name_one():
    """The default would be None."""
    served = Served(None, models=["other"])
    with pytest.raises(RequestError, match="must name one of other"):
        read_request(b'{"prompt": "a"}', chat=False, served=served, defaults=DEFAULTS)
