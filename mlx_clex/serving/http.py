"""HTTP: read requests, and write answers, streams and errors as OpenAI's API has them.

Whatever arrives gets an answer with a status and an error object, also where it is no HTTP.

Not covered: connections that stay open, and encryption.
"""

import io
import json
import logging
import re
import shlex
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import mlx.core as mx
import mlx_lm.server as stock

from ..errors import InputError, RunError
from ..model.stock import config_value
from .access import Access
from .answers import Answer, error_object
from .fields import RequestError
from .generation import PlanningResponseGenerator, ScaledModelProvider
from .jobs import Jobs
from .prompt_caches import PlannedPromptCache
from .requests import BODY_LIMIT, Request, Served, read_request

# Paths, and whether they are chat completions; the last one is mlx-lm's.
_COMPLETIONS = {"/v1/completions": False, "/v1/chat/completions": True, "/chat/completions": True}
_DISCARDED = 100_000_000  # bytes read after a refusal, so that the client can read the answer


class Server(ThreadingHTTPServer):
    """Answers each connection in a thread of its own."""

    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted

    def __init__(self, generator: Any, access: Access, served: Served, port: int) -> None:
        """Listen on `access.host`."""
        self.generator, self.access, self.served = generator, access, served
        self.started = int(time.time())
        self.fingerprint = stock.get_system_fingerprint()
        found = socket.getaddrinfo(
            access.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, Handler)  # type: ignore[arg-type]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a connection raised, instead of printing it."""
        logging.debug("Connection of %s failed", client_address, exc_info=True)


class SlowClientError(Exception):
    """A request that did not arrive in time. No TimeoutError: http.server swallows those."""


class _Incoming(io.RawIOBase):
    """What a client sends, until a deadline for all of it."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise SlowClientError
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        except TimeoutError:
            raise SlowClientError from None


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    default_request_version = "HTTP/1.0"  # HTTP/0.9 would have answers without a status
    read_seconds = 60.0  # for a whole request to arrive
    write_seconds = 60.0  # for the client to take a piece of the answer

    def setup(self) -> None:
        """Open the connection, and put a deadline on the request."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Incoming(self.connection, self.read_seconds))
        self.requestline, self.request_version, self.command = "", "HTTP/1.0", ""
        self._unread = True  # something of the request may not have been read
        self._streaming = False
        self._allowed = False  # the origin may read the answer

    def handle(self) -> None:
        """Answer the request, whatever happens."""
        try:
            super().handle()
        except (BrokenPipeError, ConnectionError, TimeoutError):
            pass  # The client hung up.
        except SlowClientError:
            message = f"The request did not arrive within {self.read_seconds:g} seconds."
            self._refuse(RequestError(message, status=408))

    def do_GET(self) -> None:
        """Answer /v1/models, /v1/models/NAME and /health."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer completions and chat completions."""
        self._answer(self._post)

    def do_OPTIONS(self) -> None:
        """Tell a browser whether a page may ask."""
        self._answer(self._options)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what http.server cannot read, in OpenAI's shape instead of HTML."""
        self._refuse(RequestError(message or self.responses[code][0], status=int(code)))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log a line about a request."""
        logging.info("%s %s", self.client_address[0], format % args)

    def _answer(self, handle: Any) -> None:
        try:
            self.server.access.check_origin(self.headers, self.connection.getsockname()[0])
            self._allowed = True
            handle()
        except (SlowClientError, BrokenPipeError, ConnectionError, TimeoutError):
            raise
        except RequestError as error:
            self._refuse(error)
        except InputError as error:
            self._refuse(RequestError(str(error)))
        except Exception as error:
            if not isinstance(error, RunError):
                logging.exception("A request failed")
            message = str(error) or type(error).__name__
            self._refuse(RequestError(message, status=500))

    def _options(self) -> None:
        self._send(204, None)

    def _get(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if path == "/health":
            well = self.server.generator.generation_available()
            self._send(200 if well else 503, {"status": "ok" if well else "unavailable"})
            return
        self.server.access.check_key(self.headers)
        if path.rstrip("/") == "/v1/models":
            self._send(200, {"object": "list", "data": self._models()})
            return
        for model in self._models():
            if path == f"/v1/models/{model['id']}":
                self._send(200, model)
                return
        raise _unknown_path(path)

    def _models(self) -> list[dict[str, Any]]:
        """The models that a request may name; the first has its context limit."""
        served = self.server.served
        limit = self.server.generator.model_provider.first_limit
        limits = {served.model: limit} if served.model else {}
        names = dict.fromkeys([*limits, *served.models])
        return [
            {"id": name, "object": "model", "created": self.server.started, "owned_by": "mlx_clex"}
            | ({"max_model_len": limits[name]} if name in limits else {})
            for name in names
        ]

    def _post(self) -> None:
        path = self.path.partition("?")[0]
        self.server.access.check_key(self.headers)
        if path not in _COMPLETIONS:
            raise _unknown_path(path)
        if self.headers.get_content_type() != "application/json":
            raise RequestError(
                "The Content-Type must be application/json, got "
                f"{self.headers.get('Content-Type', 'none')[:100]!r}.",
                status=415,
            )
        generator = self.server.generator
        request = read_request(
            self._read_body(),
            chat=_COMPLETIONS[path],
            served=self.server.served,
            defaults=generator.cli_args,
        )
        if not generator.generation_available():
            raise RunError("Generation has ended.")
        # A stream notices where it writes.
        watch = None if request.stream else self._check_client
        jobs = Jobs(generator, request.jobs, watch)
        answer = Answer(request, self.server.fingerprint)
        try:
            if request.stream:
                self._stream(request, answer, jobs)
                return
            for index, item in jobs:
                answer.add(index, item)
            self._send(200, answer.whole())
        finally:
            jobs.stop()

    def _check_client(self) -> None:
        """Raise ConnectionAbortedError if the client hung up."""
        self.connection.setblocking(False)
        try:
            data = self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return  # It waits.
        if not data:
            raise ConnectionAbortedError

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            raise RequestError("The Content-Length is missing.", status=411)
        if not re.fullmatch("[0-9]{1,18}", length):
            raise RequestError(
                f"The Content-Length must be a number of 0..{BODY_LIMIT}, got {length[:40]!r}."
            )
        if int(length) > BODY_LIMIT:
            message = f"A request has at most {BODY_LIMIT} bytes, got {length}."
            raise RequestError(message, status=413)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RequestError(f"The body ended after {len(body)} of {length} bytes.")
        self._unread = False
        return body

    def _stream(self, request: Request, answer: Answer, jobs: Jobs) -> None:
        """Send events as tokens come; one that fails half way ends with an error event.

        The stream begins when the first job is admitted: served one by one, the last is
        admitted when all others are answered.
        """
        for index, item in jobs:
            if not self._streaming:
                self._begin_stream()
            choice = answer.add(index, item)
            if isinstance(item, tuple):
                # A comment keeps the connection alive while the prompt is read.
                self.wfile.write(f": keepalive {item[0]}/{item[1]}\n\n".encode())
            elif choice.news:
                self._send_event(answer.event(choice))
        if request.include_usage:
            self._send_event(answer.usage_event())
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin_stream(self) -> None:
        self.connection.settimeout(self.write_seconds)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self._send_origin()
        self.end_headers()
        self._streaming = True

    def _send_event(self, event: Any) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _send(self, status: int, body: Any) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.connection.settimeout(self.write_seconds)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if self._allowed:
            self._send_origin()
        self.end_headers()
        self.wfile.write(data)

    def _send_origin(self) -> None:
        """Let a page that may ask read the answer."""
        origin = self.server.access.allowed_origin(self.headers)
        if origin is not None:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "*, Authorization")
            self.send_header("Vary", "Origin")

    def _refuse(self, error: RequestError) -> None:
        """Send an error: as an event within a stream, otherwise with its status."""
        self.close_connection = True
        body = error_object(str(error), status=error.status, param=error.param, code=error.code)
        try:
            if self._streaming:
                self._send_event(body)
                return
            self._send(error.status, body)
            if self._unread:
                self._discard()
        except OSError:
            pass  # The client hung up.

    def _discard(self) -> None:
        """Read what the client still sends: closing before would discard the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        end, left = time.monotonic() + 5, _DISCARDED
        while left > 0 and time.monotonic() < end:
            self.connection.settimeout(1)
            data = self.connection.recv(1 << 16)
            if not data:
                return
            left -= len(data)


def _unknown_path(path: str) -> RequestError:
    if path in _COMPLETIONS:
        return RequestError(f"{path} takes POST requests.", status=405)
    return RequestError(
        f"{path[:100]} is not served: there are /v1/chat/completions, /v1/completions, "
        "/v1/models and /health.",
        status=404,
    )


def serve(port: int, provider: ScaledModelProvider, access: Access, served: Served) -> None:
    """Start generation, wait for the model, then answer requests until interrupted.

    Raises:
        InputError: the model does not load, or the port is not free.
        RunError: one of several processes failed.
    """
    first = mx.distributed.init().rank() == 0
    args = provider.cli_args
    cache = PlannedPromptCache(
        provider,
        args.prompt_cache_size,
        max_bytes=args.prompt_cache_bytes,
        quantised_from=None if args.kv_bits is None else args.quantized_kv_start,
    )
    generator = PlanningResponseGenerator(provider, cache)
    try:
        while provider.cli_args.model and provider.model_key is None:
            if not generator.generation_available():
                raise InputError(f"The model does not load: {generator.failure}")
            time.sleep(0.05)
        if first:
            _check_top_k(provider)
            with Server(generator, access, served, port) as server:
                print(_welcome(server), flush=True)
                server.serve_forever()
        else:
            generator.join()
    except OSError as error:
        raise InputError(f"Cannot listen on {access.host}:{port}: {error.strerror}.") from error
    except KeyboardInterrupt:
        pass  # Asked to end, by the user or by generation that failed.
    finally:
        if first:
            generator.stop_and_join()
    if generator.failure is not None:
        raise RunError(f"The processes are out of step: {generator.failure}")


def _check_top_k(provider: ScaledModelProvider) -> None:
    """Refuse a --top-k that every request without a top_k would fail with."""
    vocabulary = None if provider.model is None else config_value(provider.model, "vocab_size")
    if vocabulary is not None and provider.cli_args.top_k >= vocabulary:
        raise InputError(
            f"--top-k must be within 0..{vocabulary - 1}, as the model has {vocabulary} tokens; "
            f"got {provider.cli_args.top_k}."
        )


def _welcome(server: Server) -> str:
    """Return where the server listens, and a command that asks it something."""
    bound, port = server.server_address[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(bound), str(bound))  # noqa: S104
    url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
    served = server.served
    name = served.model or served.models[0]
    body: dict[str, Any] = {"prompt": "In the beginning", "max_tokens": 20}
    if served.model is None:
        body["model"] = name
    key = ' -H "Authorization: Bearer $MLX_CLEX_API_KEY"' if server.access.api_key else ""
    lines = [f"Serving {name} at {url}"]
    if not key and bound not in ("127.0.0.1", "::1"):
        lines.append("Anyone who reaches this address can use the model: see --api-key.")
    return "\n".join(
        [
            *lines,
            f'Ask it: curl {url}/completions -H "Content-Type: application/json"{key} '
            f"-d {shlex.quote(json.dumps(body))}",
        ]
    )
