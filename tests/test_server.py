"""The server as a client sees it: the real openai package over a real socket."""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import shutil
import socket
import subprocess
import sys
import time
from unittest import mock

import mlx_lm.server
import pytest
from mlx_clex.convert import convert

from mlx_clex import load
from mlx_clex.model.scaled_model import make_prompt_cache
from mlx_clex.server import add_arguments, main

from .conftest import GOLDEN, random_adapters, stock_folder
from .served import GOOD, HEAD, SENTENCE, Server, answers_of, chat, complete, text_after

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """clex_llama in float32, so that equal computations pick equal tokens."""
    return convert(GOLDEN / "clex_llama", tmp_path_factory.mktemp("f32") / "m", dtype="float32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory, model):
    """A random CLEX with heads of 32 dimensions, which can be quantised."""
    folder = tmp_path_factory.mktemp("wide")
    source = stock_folder(folder, model, vocab_size=512)
    return convert(source, folder / "m", scaling={"type": "clex", "max_factor": 16})


@pytest.fixture(scope="module")
def server(model):
    server = Server(model, "--prefill-step-size", "32")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def alone(model):
    """What the model answers when nothing was served before."""
    return answers_of(model)


def test_the_context_limit_is_told(server, model):
    """A client must be able to know how much it may send."""
    (listed,) = server.client.models.list().data
    assert listed.id == str(model)
    assert listed.max_model_len == 256


def test_answers_do_not_depend_on_what_was_served_before(server, alone):
    """Longer, shorter and branching prompts in turn, each with the scale of its own length."""
    long = SENTENCE * 6
    prompts = [SENTENCE * 4, long, SENTENCE * 4, SENTENCE * 5 + "A cat", long + "And", SENTENCE]
    for prompt in prompts + prompts:
        assert server.ask(prompt)[0] == alone(prompt), f"{len(prompt)} characters"


def test_a_prefix_of_the_same_plan_is_not_read_again(server, alone):
    """Reuse is what makes a conversation fast, and must not change its answers."""
    first = SENTENCE * 3 + "One. "
    server.ask(first, max_tokens=1)
    text, usage = server.ask(first + "Two")
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens // 2
    assert text == alone(first + "Two")


@pytest.mark.parametrize("count", [1, 2])
def test_a_prompt_has_one_bos_token(server, model, count):
    """A prompt that began with the BOS text had two, and another answer than `generate`'s."""
    bos = load(model)[1].bos_token * count
    answers = [complete(server, prompt=text + "A cat.") for text in ("", bos)]
    answers += [complete(server, prompt=[bos + "A cat."])]
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1


def test_a_templated_message_has_one_bos_token(model):
    """The template has the BOS text, and a message may begin with it too."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    server = Server(model, "--chat-template", template)
    try:
        bos = load(model)[1].bos_token
        counts = []
        for begin in ("", bos, bos * 2):
            messages = [{"role": role, "content": begin + "A cat."} for role in ("system", "user")]
            answer = server.client.chat.completions.create(
                model="default_model", messages=messages, max_tokens=1
            )
            counts.append(answer.usage.prompt_tokens)
        assert len(set(counts)) == 1
    finally:
        server.stop()


def test_requests_at_once_get_the_answers_they_get_alone(server, alone):
    """Eight clients with prompts of mixed length, batched row by row."""
    prompts = [f"{i} " + SENTENCE * (1 + i % 5) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: server.ask(prompt)[0], prompts))
    assert answers == [alone(prompt) for prompt in prompts]


def test_streams(server, alone):
    """The same text, piece by piece."""
    stream = server.client.completions.create(
        model="default_model", prompt=SENTENCE * 3, max_tokens=20, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 3
    assert "".join(pieces) == alone(SENTENCE * 3)


def test_a_prompt_beyond_the_reach_is_refused_with_the_limit(server, alone):
    """As OpenAI's own servers do, streaming or not; the server lives on."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            server.ask(SENTENCE * 30, stream=stream)
        assert error.value.code == "context_length_exceeded"
        assert "256 tokens" in str(error.value)
    assert server.ask(SENTENCE)[0] == alone(SENTENCE)


def test_the_answer_stops_at_the_reach(server):
    """max_tokens beyond it is cut, as by `generate`."""
    done = server.client.completions.create(
        model="default_model", prompt=SENTENCE * 6, max_tokens=5000, temperature=0
    )
    assert done.usage.total_tokens == 256
    assert done.choices[0].finish_reason == "length"


def test_chat_needs_no_template(server):
    """A base model without one still answers /v1/chat/completions."""
    done = server.client.chat.completions.create(
        model="default_model", messages=[{"role": "user", "content": "hi"}], max_tokens=5
    )
    assert done.usage.completion_tokens == 5


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["in a batch", "alone"])
def test_stop_strings(more, server, alone):
    """A stop string inside a token was deleted from the text, and the text went on."""
    whole = alone(SENTENCE)
    for start in range(0, len(whole) - 3, 5):
        stop = whole[start : start + 3]
        expected = whole[: whole.index(stop)]
        done = complete(server, prompt=SENTENCE, stop=["\x00", stop], **more)
        (choice,) = done.choices
        assert (choice.text, choice.finish_reason) == (expected, "stop"), repr(stop)
        assert done.usage.completion_tokens <= 20
        stream = complete(server, prompt=SENTENCE, stop=stop, stream=True, **more)
        events = [event.choices[0] for event in stream]
        assert "".join(event.text for event in events) == expected
        assert [event.finish_reason for event in events if event.finish_reason] == ["stop"]


def test_an_answer_cut_at_a_stop_string_is_not_read_again(server, alone):
    """Agents stop at a string, and send everything again with more behind it."""
    prompt = "Once more. " + SENTENCE
    whole = alone(prompt)
    stop = whole[8:12]
    cut = complete(server, prompt=prompt, stop=stop).choices[0].text
    done = complete(server, prompt=prompt + cut)
    assert done.choices[0].text == alone(prompt + cut)
    assert done.usage.prompt_tokens_details.cached_tokens >= len(prompt) // 8


def test_every_kind_of_prompt(server, alone, model):
    """Lists, token ids, nothing at all, and several answers to each."""
    _, tokenizer = load(model)
    prompts = [SENTENCE, SENTENCE + "And", "A"]
    done = complete(server, prompt=prompts, n=2)
    texts = [choice.text for choice in sorted(done.choices, key=lambda choice: choice.index)]
    assert texts == [alone(prompt) for prompt in prompts for _ in "12"]
    assert done.usage.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    assert [choice.text for choice in complete(server, prompt=ids).choices] == texts[::2]
    assert complete(server, prompt=ids[0]).choices[0].text == texts[0]
    assert complete(server, prompt="").choices[0].text == alone("")


def test_a_completion_begins_with_its_space(server, model):
    """Prompt and answer together are what the model wrote; a message has no space before it."""
    tokenizer = load(model)[1]
    word = tokenizer.encode("A the")[-1]
    options = {"logit_bias": {str(word): 1000}, "max_tokens": 1}
    for prompt in ("A", tokenizer.encode("A")):
        choices = complete(server, prompt=prompt, n=2, **options).choices
        assert [choice.text for choice in choices] == [" the"] * 2
        stream = complete(server, prompt=prompt, stream=True, **options)
        assert "".join(event.choices[0].text for event in stream) == " the"
    ask = server.client.chat.completions.create
    done = ask(model="default_model", temperature=0, **chat() | options)
    assert done.choices[0].message.content == "the"


def test_answers_with_a_seed_differ_and_come_again(server):
    """n answers with one seed were n times the same."""
    options = {"prompt": SENTENCE, "temperature": 2, "max_tokens": 12}
    both = [choice.text for choice in complete(server, n=2, seed=7, **options).choices]
    assert both[0] != both[1]
    assert both == [complete(server, seed=s, **options).choices[0].text for s in (7, 8)]


def test_tools_need_a_chat_template(server):
    """They were left out, and the answer did not say so."""
    body = chat("hi", tools=[{"type": "function", "function": {"name": "f"}}])
    status, text = server.raw("POST", "/v1/chat/completions", json.dumps(body))
    assert (status, json.loads(text)["error"]["param"]) == (400, "tools")


def test_log_probabilities(server):
    """A stream lists the same likeliest tokens, in the same order."""
    done = complete(server, prompt=SENTENCE, max_tokens=6, logprobs=3).choices[0].logprobs
    assert len(done.tokens) == len(done.token_logprobs) == 6
    for token, own, top in zip(done.tokens, done.token_logprobs, done.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top.values()) == top[token] == own < 0, "greedy"
    stream = complete(server, prompt=SENTENCE, max_tokens=6, logprobs=3, stream=True)
    parts = [event.choices[0].logprobs for event in stream]
    assert [token for part in parts if part for token in part.tokens] == done.tokens

    options = chat(model="default_model", temperature=1, seed=3, logprobs=True)
    ask = functools.partial(server.client.chat.completions.create, **options | {"max_tokens": 6})
    content = ask().choices[0].logprobs.content
    assert [bool(each.top_logprobs) for each in content] == [False] * 6
    streamed = [
        each
        for event in ask(stream=True, top_logprobs=2)
        for each in (event.choices[0].logprobs.content if event.choices[0].logprobs else ())
    ]
    assert [(each.token, each.logprob) for each in streamed] == [
        (each.token, each.logprob) for each in content
    ]
    assert all(
        len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob >= each.logprob
        for each in streamed
    )


def test_a_prompt_far_beyond_the_reach_is_not_tokenised(server):
    """60 MB of prompt took 10 GB and five minutes before they were refused."""
    for path, body in [
        ("/v1/completions", GOOD | {"prompt": "na " * 2_500_000}),
        ("/v1/chat/completions", chat("na " * 2_500_000)),
    ]:
        started = time.monotonic()
        status, text = server.raw("POST", path, json.dumps(body))
        error = json.loads(text)["error"]
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert "bytes" in error["message"]
        assert time.monotonic() - started < 10


def test_a_client_that_hangs_up_frees_its_place(server, alone):
    """Mid-stream, again and again; the next request is answered."""
    body = json.dumps(GOOD | {"prompt": SENTENCE, "max_tokens": 200, "stream": True}).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(HEAD % len(body) + body)
            connection.recv(200)
    assert server.ask(SENTENCE)[0] == alone(SENTENCE)
    assert server.raw("GET", "/health")[0] == 200


def test_adapters_of_the_server_and_of_a_request(model, wide, tmp_path):
    """Each answers as `generate` with it does, whatever was served before by another.

    Adapters that a request named for the default model were silently ignored.
    """
    first = random_adapters(model, tmp_path / "first", 1)
    second = random_adapters(model, tmp_path / "second", 2)
    bare, one, two = (answers_of(model, adapters) for adapters in (None, first, second))
    assert len({answer(SENTENCE * 3) for answer in (bare, one, two)}) == 3
    prompts = [SENTENCE * 3, SENTENCE * 3 + "And"]
    plain = tmp_path / "plain"  # the same model under another name
    plain.symlink_to(model)
    (tmp_path / "empty").mkdir()
    allowed = [("--allow-model", plain), ("--allow-model", wide)]
    allowed += [("--allow-adapters", folder) for folder in (second, tmp_path / "empty")]
    options = [str(word) for pair in allowed for word in pair]
    server = Server(model, "--adapter-path", str(first), *options)
    try:
        for _ in range(2):
            for prompt in prompts:
                assert server.ask(prompt)[0] == one(prompt)
                assert server.ask(prompt, adapters=second)[0] == two(prompt)
                assert server.ask(prompt, model=str(model))[0] == one(prompt)
                assert server.ask(prompt, model=str(plain))[0] == bare(prompt)
                with pytest.raises(openai.NotFoundError, match="adapter_config"):
                    server.ask(prompt, adapters=tmp_path / "empty")
                with pytest.raises(openai.NotFoundError, match="not served"):
                    server.ask(prompt, adapters=tmp_path)
            assert server.ask(prompts[0])[0] == one(prompts[0])
            text, usage = server.ask(prompts[1])
            assert text == one(prompts[1])
            assert usage.prompt_tokens_details.cached_tokens, "the same adapters, again"

        server.ask(SENTENCE, adapters=second)
        shutil.copy(first / "adapters.safetensors", second)
        server.ask(SENTENCE, model=str(wide))
        assert server.ask(prompts[0], adapters=second)[0] == one(prompts[0]), "trained on"
        server.ask(SENTENCE, model=str(wide))
        assert server.client.models.list().data[0].max_model_len == 256, "that of the first model"
    finally:
        server.stop()


@pytest.mark.parametrize("options", [("--draft-model",), ("--kv-bits", "8"), ("--scale", "6")])
def test_drafts_quantised_keys_and_fixed_scales(options, wide):
    """One plan for prompt and answer together: nothing moves half way, nothing is redone."""
    from mlx_lm.generate import stream_generate

    prompt, count = SENTENCE, 60
    fixed = 6.0 if options[0] == "--scale" else None
    loaded, tokenizer = load(wide, scale=fixed)
    ids = tokenizer.encode(prompt)
    quantised = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    cache = make_prompt_cache(loaded, None if fixed else len(ids) + count)
    parts = stream_generate(
        loaded,
        tokenizer,
        ids,
        max_tokens=count,
        prompt_cache=cache,
        **(quantised if options[0] == "--kv-bits" else {}),
    )
    expected = text_after(tokenizer, ids, parts)
    if options[0] == "--draft-model":
        options = ("--draft-model", str(wide), "--num-draft-tokens", "2")
    elif options[0] == "--kv-bits":
        options = (*options, "--kv-group-size", "32", "--quantized-kv-start", "0")
    server = Server(wide, *options)
    try:
        assert server.ask(prompt, max_tokens=count)[0] == expected
        assert server.ask(prompt, max_tokens=count)[0] == expected
    finally:
        server.stop()


@pytest.mark.parametrize(
    "options",
    [
        ("--prompt-cache-bytes", "1"),
        ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "60"),
    ],
)
def test_what_may_not_be_kept_is_read_again(options, wide):
    """Requests that are served one by one reused it all the same."""
    server = Server(wide, "--scale", "6", *options)
    try:
        usages = [server.ask(SENTENCE * count, 4, seed=1)[1] for count in (1, 3)]
        assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, 0]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scale", "banana"), ["--scale", "banana"]),
        (("--scale", "grow"), ["--scale grow"]),
        (("--port", "70000"), ["--port", "65535"]),
        (("--temp", "-1"), ["temperature", "0..100"]),
        (("--kv-bits", "7"), ["--kv-bits", "7"]),
        (("--chat-template-args", "5"), ["--chat-template-args", "object"]),
        (("--prompt-concurrency", "-1"), ["--prompt-concurrency", "at least 1, got -1"]),
        (("--prompt-concurrency", "0"), ["--prompt-concurrency", "at least 1, got 0"]),
        (("--decode-concurrency", "0"), ["--decode-concurrency", "at least 1, got 0"]),
        (("--prefill-step-size", "0"), ["--prefill-step-size", "at least 1, got 0"]),
        (("--prompt-cache-size", "-1"), ["--prompt-cache-size", "at least 0, got -1"]),
    ],
)
def test_options_that_cannot_be_used_are_one_line(options, words, monkeypatch, capsys):
    """With status 2, before the model is loaded."""
    monkeypatch.setattr(sys, "argv", ["server", "--model", "/nowhere/at/all", *options])
    try:
        status = main()
    except SystemExit as ended:  # argparse ends by itself
        status = ended.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def test_nothing_to_serve(monkeypatch, capsys):
    """A server without a model loaded whatever a request named."""
    monkeypatch.setattr(sys, "argv", ["server"])
    assert main() == 2
    assert "give --model, or --allow-model" in capsys.readouterr().err


def started(model, *options):
    command = [sys.executable, "-m", "mlx_clex.server", "--model", str(model), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def error_of(process):
    """The one line of a server that ended with status 2."""
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("mlx_clex server:")]
    return line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "/nowhere/at/all"), ["/nowhere/at/all"]),
        (("--scale", "99"), ["1..8"]),
        (("--top-k", "4000"), ["--top-k must be within 0..", "got 4000"]),
    ],
)
def test_a_server_that_cannot_use_its_model_says_so_in_one_line(options, words, model):
    """And exits with status 2, instead of listening without a model."""
    line = error_of(started(model, *options))
    assert all(word in line for word in words), line


def test_a_server_that_ends_is_not_aborted(model):
    """The end of the thread that generates raced the interpreter's: one in two was aborted."""
    ends = [started(model, "--host", "256.1.1.1") for _ in range(4)]
    assert all("Cannot listen on 256.1.1.1" in error_of(end) for end in ends)


def test_the_options_are_those_of_mlx_lm():
    """A list of our own goes stale when mlx-lm adds an option or changes a default."""

    def options_of(parser):
        return {
            action.dest: (action.option_strings, action.default, action.nargs, action.choices)
            for action in parser._actions
        }

    built = []
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", lambda p: built.append(p)),
        # What is parsed is None then, which has no `log_level`.
        contextlib.suppress(AttributeError),
    ):
        mlx_lm.server.main()
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    theirs, ours = options_of(*built), options_of(parser)
    assert ours.keys() - theirs.keys() == {
        "scale",
        "allow_model",
        "allow_adapters",
        "api_key",
        "force",
    }
    assert ours.pop("allowed_origins")[0] == theirs.pop("allowed_origins")[0]
    assert {name: ours.get(name) for name in theirs} == theirs
