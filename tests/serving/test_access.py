"""Who may ask: pages, hosts and clients that are refused, each with its status."""

import pytest

from mlx_clex.serving.access import Access
from mlx_clex.serving.http import Server, _welcome
from mlx_clex.serving.requests import Served

from .fake_server import Generator, ask, refused, serving


@pytest.fixture
def server():
    server = serving()
    yield server
    server.shutdown()
    server.server_close()


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
    ("asked", "status"),
    [
        ({"body": b'{"prompt": "x", "max_tokens": 0}'}, 400),
        ({"path": "/v1/nothing"}, 404),
        ({"Content_Type": "text/plain"}, 415),
        ({"body": b'{"prompt": "!"}'}, 500),
    ],
)
def test_a_page_may_read_why_it_was_refused(asked, status, server):
    """Browsers hid the error from the page, which saw a failed connection."""
    answer = ask(server, Origin="http://localhost:3000", **asked)
    refused(answer, status)
    assert answer[1]["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert answer[1]["Vary"] == "Origin"


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


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "key", False)],  # noqa: S104
)
def test_a_server_that_anyone_can_reach_says_so(host, key, warned):
    """--host 0.0.0.0 is one word away from serving the whole network."""
    server = Server(Generator(), Access(host, api_key=key), Served("m"), 0)
    lines = _welcome(server).splitlines()
    assert any("--api-key" in line for line in lines) == warned
    assert "http://127.0.0.1:" in lines[0]
    server.server_close()
