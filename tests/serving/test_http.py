"""Whatever arrives at the socket gets an answer in OpenAI's shape, without a model here."""

import json
import socket
import time

import openai
import pytest
from mlx_lm.server import GenerationContext

from mlx_clex.serving.http import Handler, _welcome
from mlx_clex.serving.requests import BODY_LIMIT, Served

from .fake_server import Text, ask, refused, send, serving


@pytest.fixture
def server():
    server = serving()
    yield server
    server.shutdown()
    server.server_close()


def test_an_answer(server):
    """The whole text, its tokens counted."""
    status, headers, body = ask(server)
    assert status == 200
    assert headers["Access-Control-Allow-Origin"] is None
    assert body["object"] == "text_completion"
    assert body["model"] == "m"
    assert body["choices"] == [
        {"index": 0, "text": "abc", "finish_reason": "stop", "logprobs": None}
    ]
    assert body["usage"]["total_tokens"] == 6


@pytest.mark.parametrize(
    ("length", "status"),
    [
        ("100000000", 413),
        (str(BODY_LIMIT + 1), 413),
        ("9" * 23, 400),
        ("9" * 5000, 400),
        ("-5", 400),
        ("ten", 400),
        ("+5", 400),
        ("", 400),
        (None, 411),
    ],
)
def test_a_body_of_impossible_length_is_not_read(length, status, server):
    """23 digits closed the connection without an answer, and a negative length read for ever."""
    refused(ask(server, Content_Length=length), status, "Content-Length" if status != 413 else "")


def test_a_client_that_sends_on_gets_the_refusal(server):
    """A connection closed before all is read is reset, and the client sees no answer."""
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    body = b"x" * (BODY_LIMIT + 1)
    refused(send(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body), 413)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /v1/comp",
        b"POST /v1/completions HTTP/1.1\r\nHost: loc",
        b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
        b'Content-Length: 17\r\n\r\n{"prompt":',
    ],
)
def test_half_a_request_does_not_hold_a_thread(data, server, monkeypatch):
    """200 of 200 half-sent bodies were held for good."""
    monkeypatch.setattr(Handler, "read_seconds", 0.3)
    started = time.monotonic()
    refused(send(server, data), 408, "0.3 seconds")
    assert time.monotonic() - started < 10


def test_a_slow_request_has_one_deadline(server, monkeypatch):
    """A byte now and then restarted the timeout."""
    monkeypatch.setattr(Handler, "read_seconds", 0.5)
    started = time.monotonic()
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.settimeout(0.1)
        out = b""
        while not out and time.monotonic() - started < 10:
            connection.sendall(b"G")
            try:
                out = connection.recv(1 << 16)
            except TimeoutError:
                continue
    assert out.split()[1] == b"408"


def test_a_body_that_ends_early(server):
    """The client closed its half of the connection."""
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    refused(send(server, head + b'Content-Length: 17\r\n\r\n{"pro', end=True), 400, "5 of 17")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/completions HTTP/1.1\r\n\r\n", 405),
        (b"BREW / HTTP/1.1\r\n\r\n", 501),
        (b"DELETE /v1/models/m HTTP/1.1\r\n\r\n", 501),
    ],
)
def test_what_is_no_request_gets_an_error_object(data, status, server):
    """http.server answers in HTML, and without a status where the line has no version."""
    refused(send(server, data), status)


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/embeddings", "/v1/completions/x", "/v1/models/x"]
)
def test_unknown_paths(path, server):
    """mlx-lm answers with the text "Not Found"."""
    refused(ask(server, path=path), 404, "not served")
    refused(ask(server, "GET", path), 404, "not served")


def test_models(server):
    """By the list and by name, with the context limit."""
    model = ask(server, "GET", "/v1/models")[2]["data"][0]
    assert (model["id"], model["max_model_len"]) == ("m", 256)
    assert ask(server, "GET", "/v1/models/m")[2] == model
    other = serving(served=Served("org/m", models=["org/n"]))
    models = ask(other, "GET", "/v1/models")[2]["data"]
    assert [(each["id"], each.get("max_model_len")) for each in models] == [
        ("org/m", 256),
        ("org/n", None),
    ]
    assert ask(other, "GET", "/v1/models/org%2Fn")[2]["id"] == "org/n"
    other.shutdown()
    other.server_close()


def test_failures_have_their_status(server):
    """Refusals, and a generation that fails; only a model that does not load is not found."""
    refused(ask(server, body=b'{"prompt": "refused"}'), 400, "no")
    assert refused(ask(server, body=b'{"prompt": "unfit"}'), 400, "too long")["code"] is None
    refused(ask(server, body=b'{"prompt": "ab!"}'), 500, "out of memory")
    refused(ask(server, body=b'{"prompt": ["ab", "refused"]}'), 400, "no")
    refused(ask(server, body=b'{"prompt": ["refused", "ab"], "stream": true}'), 400, "no")
    server.generator.alive = False
    refused(ask(server), 500, "ended")
    assert ask(server, "GET", "/health")[0] == 503


def client_of(server):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_a_stream_that_fails_says_so_and_ends(server):
    """It ended with HTTP 200, without an error and without a finish_reason."""
    stream = client_of(server).completions.create(model="m", prompt="ab!", stream=True)
    assert [next(stream).choices[0].text for _ in "ab"] == ["a", "b"]
    with pytest.raises(openai.APIError, match="out of memory"):
        next(stream)

    raw = send(
        server,
        b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
        b'Content-Length: 33\r\n\r\n{"prompt": "ab!", "stream": true}',
    )
    events = raw.partition(b"\r\n\r\n")[2].split(b"\n\n")
    assert events[0] == b": keepalive 3/3"
    assert json.loads(events[-2].removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert b"[DONE]" not in raw


def test_several_answers_in_one_stream(server):
    """Each with its index and its end; the tokens of all are counted once."""
    stream = client_of(server).completions.create(
        model="m",
        prompt=["ab", "c"],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, ends, usage = {}, {}, None
    for event in stream:
        usage = event.usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason
    assert texts == {0: "ab", 1: "ab", 2: "c", 3: "c"}
    assert set(ends.values()) == {"stop"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 6)


def test_a_stream_begins_with_the_first_answer(server):
    """Served one by one, nothing was sent until the last of several prompts was begun."""
    put, waiting = server.generator.put, []
    server.generator.put = lambda job: (waiting.append if job[1].prompt == "cd" else put)(job)
    client = client_of(server).with_options(timeout=10)
    stream = client.completions.create(model="m", prompt=["ab", "cd"], stream=True)
    events = [next(stream), next(stream)]
    put(waiting.pop())
    choices = [event.choices[0] for event in [*events, *stream]]
    assert [(choice.index, choice.text) for choice in choices] == [
        (0, "a"),
        (0, "b"),
        (1, "c"),
        (1, "d"),
    ]


@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_hangs_up_ends_its_answer(started, server):
    """Without a stream nobody noticed, and the answer was generated to its end."""
    tickets = []

    def put(job):
        tickets.append(job[0])
        if started:
            job[0].put(GenerationContext(False, False, None, Text("ab"), "normal", [1]))
            job[0].put((1, 3))

    server.generator.put = put
    body = b'{"prompt": "ab", "n": 2}'
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(1.5)
        assert [ticket.stopped for ticket in tickets] == [False, False], "the client waits"
    end = time.monotonic() + 10
    while not all(ticket.stopped for ticket in tickets) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(ticket.stopped for ticket in tickets)


def test_the_first_line_says_where_and_how_to_ask(server):
    """Clients need the URL with /v1."""
    where, how = _welcome(server).splitlines()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    assert where == f"Serving m at {url}"
    assert how.startswith(f'Ask it: curl {url}/completions -H "Content-Type: application/json" ')
