"""The HTTP side of the server on a socket, with a generator that needs no model."""

import http.client
import json
import socket
import threading
from types import SimpleNamespace

from mlx_lm.server import GenerationContext, Response

from mlx_clex.errors import InputError
from mlx_clex.serving.access import Access
from mlx_clex.serving.fields import RequestError
from mlx_clex.serving.http import Server
from mlx_clex.serving.requests import Served

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
    model_provider = SimpleNamespace(first_limit=256)

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
        errors = {"refused": RequestError("no", param="prompt"), "unfit": InputError("too long")}
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
