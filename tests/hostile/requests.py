"""Hostile requests: what a stranger's client or web page may send to the server.

Each has the status that it must get, within a time, as an error object of OpenAI's shape; then a
usual request must get its usual answer, and at the end the server must hold its memory and its
log must have no traceback. The first table is that of tests/serving/test_requests.py.

Not covered: load (`soak.py`).
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..served import GOOD, Server, chat
from ..serving.test_requests import CHATS, COMPLETIONS

_SECONDS = 120.0  # for an answer; most take milliseconds where the machine is not busy
_LAST = b"Connection: close\r\n\r\n"


@dataclass(frozen=True)
class Sent:
    """A request as bytes, and the statuses that may answer it."""

    name: str
    data: bytes
    statuses: tuple[int, ...]
    half: bool = False  # the client sends no more, and hangs up


def post(body: Any, path: str = "/v1/completions", head: str = "", method: str = "POST") -> bytes:
    """Return the bytes of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Content-Length: {len(data)}"]
    if "Host:" not in head:
        lines.append("Host: 127.0.0.1")
    if "Content-Type:" not in head:
        lines.append("Content-Type: application/json")
    lines += [line for line in head.split("\n") if line]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n" + _LAST + data


def _of_tables() -> Iterator[Sent]:
    tables: tuple[dict[str, Any], ...] = (COMPLETIONS, CHATS)
    for name, (body, _) in tables[0].items():
        whole = isinstance(body, bytes) or "prompt" in body or name == "no prompt"
        yield Sent(name, post(body if whole else {"prompt": "a", **body}), (400,))
    for name, (body, _) in tables[1].items():
        yield Sent(f"chat: {name}", post(body, "/v1/chat/completions"), (400,))


def _of_access(secret: Path) -> Iterator[Sent]:
    for name, fields in {
        "a folder": {"model": str(secret.parent)},
        "a file": {"model": str(secret)},
        "no such folder": {"model": "/no/such/folder"},
        "a home": {"model": "~"},
        "a path above": {"model": "../../.."},
        "of the hub": {"model": "someone/evil"},
        "of many bytes": {"model": "x" * 1_000_000},
        "with a NUL": {"model": "a\0b"},
        "bundled": {"model": "bundled:base"},
        "adapters": {"adapters": str(secret.parent)},
        "a draft": {"draft_model": str(secret.parent)},
    }.items():
        yield Sent(f"model {name}", post({**GOOD, **fields}), (404,))
    evil = "http://evil.example"
    for name, head in {
        "origin": f"Origin: {evil}",
        "origin null": "Origin: null",
        "origin of a file": "Origin: file:///etc/passwd",
        "origin like ours": "Origin: http://127.0.0.1.evil.example",
        "origin with a user": "Origin: http://127.0.0.1@evil.example",
        "host": "Host: evil.example",
        "host like ours": "Host: 127.0.0.1.evil.example",
        "host with a user": "Host: 127.0.0.1@evil.example",
        "host of brackets": "Host: [::1",
        "host empty and origin": f"Host: \nOrigin: {evil}",
    }.items():
        yield Sent(f"page: {name}", post(GOOD, head=head), (403,))
        yield Sent(f"page: asking first, {name}", post(b"", head=head, method="OPTIONS"), (403,))
    for name in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        yield Sent(f"type {name}", post(GOOD, head=f"Content-Type: {name}"), (415,))
    for path in (
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2fetc",
        "/etc/passwd",
        "/../..",
        "*",
    ):
        yield Sent(f"path {path}", post(b"", path, method="GET"), (404,))


def _of_http() -> Iterator[Sent]:
    line = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    kind = b"Content-Type: application/json\r\n"
    for name, value in {
        "of 23 digits": b"9" * 23,
        "of 5,000 digits": b"9" * 5000,
        "negative": b"-1",
        "a word": b"many",
        "half": b"1.5",
        "of another script": "\u0665".encode(),
        "hexadecimal": b"0x10",
        "empty": b"",
    }.items():
        data = line + kind + b"Content-Length: " + value + b"\r\n" + _LAST
        yield Sent(f"a length {name}", data, (400, 411, 413))
    yield Sent("no length", line + kind + _LAST, (400, 411))
    two = b"Content-Length: 2\r\nContent-Length: 5\r\n"
    yield Sent("two lengths", line + kind + two + _LAST + b"{}", (400,))
    pieces = b"Transfer-Encoding: chunked\r\n"
    yield Sent("in chunks", line + kind + pieces + _LAST + b"2\r\n{}\r\n0\r\n\r\n", (400, 411, 501))
    for name, data, statuses in (
        ("noise", bytes(range(256)) + b"\r\n\r\n", (400,)),
        ("an empty line", b"\r\n\r\n", (0, 400)),
        ("no version", b"POST /v1/completions\r\n\r\n", (400,)),
        ("version 9", b"POST /v1/completions HTTP/9.9\r\n\r\n", (400, 505)),
        ("a method", b"EVIL / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (405, 501)),
        ("a line of a megabyte", b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n", (400, 414)),
        ("a header of a megabyte", line + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n", (400, 431)),
        ("10,000 headers", line + b"X: a\r\n" * 10_000 + b"\r\n", (400, 431)),
        ("a header of nothing", line + b"\r\n: \r\n\r\n", (400, 411, 415)),
        ("a body of 9 MB", post(b" " * 9_000_000), (400, 413)),
        ("a body of 60 MB", post(GOOD | {"prompt": "a " * 30_000_000}), (413,)),
        ("a prompt of 7 MB", post(GOOD | {"prompt": "a " * 3_500_000}), (400,)),
        ("ids of 7 MB", post(GOOD | {"prompt": [1] * 2_300_000}), (400,)),
        ("messages of 7 MB", post(chat("a " * 3_500_000), "/v1/chat/completions"), (400,)),
        (
            "100,000 messages",
            post(
                {"messages": [{"role": "user", "content": "a"}] * 100_000}, "/v1/chat/completions"
            ),
            (400,),
        ),
        ("100,000 stop strings", post(GOOD | {"stop": ["a"] * 100_000}), (400,)),
        (
            "100,000 biases",
            post(GOOD | {"logit_bias": {str(i): 1 for i in range(100_000)}}),
            (400,),
        ),
    ):
        yield Sent(name, data, statuses)
    for name, data in {
        "nothing": b"",
        "half a line": b"POST /v1/com",
        "half a head": line,
        "half a body": line + kind + b"Content-Length: 100\r\n\r\n{",
    }.items():
        yield Sent(f"{name}, then no more", data, (), half=True)
    refused: dict[str, dict[str, Any]] = {
        "a bias for no token": {"logit_bias": {"512": 1}},
        "more than all tokens": {"top_k": 512, "temperature": 1},
        "an id that does not exist": {"prompt": [1, 512]},
        "a prompt beyond the reach": {"prompt": [1] * 256},
    }
    for name, fields in refused.items():
        yield Sent(name, post({**GOOD, **fields}), (400,))
    answered: dict[str, dict[str, Any]] = {
        "a long answer": {"max_tokens": 1 << 30},
        "hot": {"temperature": 100, "max_tokens": 50},
        "128 answers": {"n": 128},
        "penalties": {"repetition_penalty": 1e6, "presence_penalty": -1e6},
        "no text": {"prompt": ""},
        "a NUL": {"prompt": "\0"},
        "control characters": {"prompt": "\x1b]0;evil\x07"},
        "unknown fields": {"evil": {"a": [1]}, "__class__": "x"},
    }
    for name, fields in answered.items():
        yield Sent(f"to answer: {name}", post({**GOOD, **fields}), (200,))


def requests(secret: Path) -> list[Sent]:
    """Return all requests; `secret` is a file outside."""
    return [*_of_tables(), *_of_access(secret), *_of_http()]


def status_of(port: int, sent: Sent, seconds: float = _SECONDS) -> tuple[int, bytes]:
    """Send a request, and return the status and the body of the answer; 0 for none in time."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(sent.data)
            if sent.half:
                return 0, b""
            while piece := connection.recv(1 << 16):
                answer += piece
        except (ConnectionError, TimeoutError):
            pass  # what has arrived counts
    head, _, body = answer.partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    known = len(parts) > 1 and parts[0].startswith(b"HTTP/") and parts[1].isdigit()
    return int(parts[1]) if known else 0, body


def memory_of(pid: int) -> int:
    """Return the bytes of memory of a process, or 0 where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/statm").read_text()
    except OSError:
        return 0
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_of(pid: int) -> int:
    """Return the largest memory that a process has had, in bytes, or 0."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("VmHWM")), 0)


def try_requests(model: Path, secret: Path, most: int) -> tuple[int, list[str]]:
    """Send every request to a server; return how many there were, and what was lost.

    Args:
        model: a folder.
        secret: a file outside.
        most: bytes that the server may need above its start.
    """
    lost = []
    server = Server(model, "--prompt-cache-size", "2")
    try:
        usual = server.ask("The quick brown fox", 8)[0]
        before = peak_of(server.process.pid)
        sent = requests(secret)
        for each in sent:
            began = time.monotonic()
            status, body = status_of(server.port, each)
            seconds = time.monotonic() - began
            faults = []
            if not each.half and status not in each.statuses:
                faults.append(f"status {status}, not {each.statuses}: {body[:200]!r}")
            if status >= 400 and not _is_error(body):
                faults.append(f"no error object: {body[:200]!r}")
            if seconds > _SECONDS:
                faults.append(f"{seconds:.0f} seconds")
            if secret.read_bytes() in body or b"Traceback" in body:
                faults.append("the answer has what it must not have")
            if server.ask("The quick brown fox", 8)[0] != usual:
                faults.append("another answer to the next client")
            lost += [f"request: {each.name}: {fault}" for fault in faults]
        over = peak_of(server.process.pid) - before
        if over > most:
            lost.append(f"requests: {over >> 20} MB above the start")
    finally:
        server.process.terminate()
        _, log = server.process.communicate(timeout=60)
    if "Traceback" in log:
        lost.append(f"requests: a traceback in the log: {log[-500:]}")
    return len(sent), lost


def _is_error(body: bytes) -> bool:
    try:
        error = json.loads(body)["error"]
        return isinstance(error["message"], str) and "\n" not in error["message"]
    except (ValueError, LookupError, TypeError):
        return False
