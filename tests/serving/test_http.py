"""Whatever arrives at the socket gets an answer in OpenAI's shape, without a model here."""

import http.client
import json
import socket
import threading
import time
from types import SimpleNamespace

import openai
import pytest
from mlx_lm.server import GenerationContext, Response

from mlx_clex.errors import InputError
from mlx_clex.serving.access import Access
from mlx_clex.serving.fields import RequestError
from mlx_clex.serving.http import Handler, Server, _welcome
from mlx_clex.serving.requests import BODY_LIMIT, Served

from .test_requests import DEFAULTS


class Text:
    """Stands for AnswerText: every token is the letter that its script has."""

    def __init__(self, letters):
        self.letters = iter(letters)

    def take(self):
        return [("normal", next(self.letters))]

    def finish(self):
        return []


class Generator:
    """Answers in the thread that asks: each prompt letter by letter; some words are special."""

    cli_args = DEFAULTS
    model_provider = SimpleNamespace(reach=256)

    def __init__(self):
        self.requests = self
        self.alive = True

    def generation_available(self):
        return self.alive

    def can_stop(self, args):
        return True

    def put(self, job):
        ticket, request, _ = job
        prompt = request.prompt
        errors = {"refused": RequestError("no", param="prompt"), "gone": InputError("not there")}
        if prompt in errors:
            ticket.put(errors[prompt])
            return
        ticket.put(GenerationContext(False, False, None, Text(prompt), "normal", [1, 2, 3]))
        ticket.put((3, 3))
        for i, letter in enumerate(prompt):
            if letter == "!":
                ticket.put(RuntimeError("out of memory"))
                return
            last = i == len(prompt) - 1
            ticket.put(Response(letter, i, -1.0, "stop" if last else None, ()))
        ticket.put(None)


def serving(access=None, served=None):
    server = Server(Generator(), access or Access("127.0.0.1"), served or Served("m"), 0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def server():
    server = serving()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method="POST", path="/v1/completions", body=b'{"prompt": "abc"}', **headers):
    """(status, headers, body) of a request; headers of the value None are left out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    names = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    names |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host="Host" in names)
    for name, value in names.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(data) if data else None


def send(server, data, end=False):
    """What comes back for raw bytes."""
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        out = b""
        while piece := connection.recv(1 << 16):
            out += piece
    return out


def refused(answer, status, words=""):
    """Whether an answer of `ask` or `send` is an error of this status in OpenAI's shape."""
    if isinstance(answer, bytes):
        head, _, data = answer.partition(b"\r\n\r\n")
        answer = int(head.split()[1]), None, json.loads(data)
    assert answer[0] == status, answer
    assert answer[2].keys() == {"error"}
    error = answer[2]["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert words in error["message"]
    return error


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


@pytest.mark.parametrize("kind", ["text/plain", None, "application/x-www-form-urlencoded", "json"])
def test_a_page_without_leave_cannot_post(kind, server):
    """Browsers send these types to any machine without asking it first."""
    refused(ask(server, Content_Type=kind), 415, "application/json")


def test_json_in_a_charset_is_json(server):
    """Some clients say so."""
    assert ask(server, Content_Type="application/json; charset=utf-8")[0] == 200


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://[::1]:8443", True),
        ("http://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://evil.example/localhost", False),
        ("http://localhost@evil.example", False),
        ("null", False),
        ("file://", False),
        ("localhost", False),
        ("http://[::1", False),
        ("http://app.example:5173", False),
    ],
)
def test_only_pages_of_this_machine_may_ask(origin, allowed, server):
    """Any page that the user visited could drive the server, and read its answers."""
    for method in ("POST", "OPTIONS"):
        status, headers, _ = answer = ask(server, method, Origin=origin)
        if allowed:
            assert status == (200 if method == "POST" else 204)
            assert headers["Access-Control-Allow-Origin"] == origin
            assert "Authorization" in headers["Access-Control-Allow-Headers"]
        else:
            refused(answer, 403, "--allowed-origins")
            assert headers["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost:8080", True),
        ("LOCALHOST", True),
        ("127.0.0.1:1", True),
        ("[::1]:8080", True),
        ("evil.example", False),
        ("evil.example:8080", False),
        ("localhost.evil.example", False),
        ("10.0.0.1", False),
        ("", False),
        ("[::1", False),
        ("evil.example@localhost:80 x", False),
    ],
)
def test_only_this_machine_is_asked(host, allowed, server):
    """A page's own name can be made to point to this machine, and is its origin then."""
    answer = ask(server, "GET", "/v1/models", Host=host)
    if allowed:
        assert answer[0] == 200
    else:
        refused(answer, 403, "is not this machine")


def test_other_origins_and_all_of_them():
    """--allowed-origins lets a page ask, and its host be asked."""
    server = serving(Access("127.0.0.1", ["https://app.example"]))
    assert ask(server, Origin="https://app.example", Host="app.example")[0] == 200
    refused(ask(server, Origin="http://evil.example"), 403)
    refused(ask(server, Origin="tauri://app.example"), 403)
    server.server_close()
    server = serving(Access("127.0.0.1", ["*"]))
    status, headers, _ = ask(server, Origin="http://evil.example", Host="evil.example")
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, "*")
    server.server_close()


def test_a_key():
    """Everything but /health and a browser's first question needs it."""
    server = serving(Access("127.0.0.1", api_key="sécret"))
    for value in (None, "", "sécret", "Bearer ", "Bearer other", "bearer sécret"):
        value = value and value.encode()
        assert refused(ask(server, Authorization=value), 401)["code"] == "invalid_api_key"
        refused(ask(server, "GET", "/v1/models", Authorization=value), 401)
    right = "Bearer sécret".encode()
    assert ask(server, Authorization=right)[0] == 200
    assert ask(server, "GET", "/v1/models", Authorization=right)[0] == 200
    assert ask(server, "GET", "/health")[0] == 200
    assert ask(server, "OPTIONS", Origin="http://localhost")[0] == 204
    assert "Bearer $MLX_CLEX_API_KEY" in _welcome(server)
    server.server_close()


def test_failures_have_their_status(server):
    """A refusal, a model that does not load, and a generation that fails."""
    refused(ask(server, body=b'{"prompt": "refused"}'), 400, "no")
    assert refused(ask(server, body=b'{"prompt": "gone"}'), 404)["code"] == "model_not_found"
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


def test_the_first_line_says_where_and_how_to_ask(server):
    """Clients need the URL with /v1."""
    where, how = _welcome(server).splitlines()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    assert where == f"Serving m at {url}"
    assert how.startswith(f'Ask it: curl {url}/completions -H "Content-Type: application/json" ')
