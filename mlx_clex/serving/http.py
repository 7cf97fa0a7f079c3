"""The HTTP side of the server: reads requests and writes answers in OpenAI's shape."""

import json
import re
import time
from typing import Any

import mlx.core as mx
import mlx_lm.server as stock
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from ..errors import InputError, RunError
from .generation import PlanningResponseGenerator, Refusal, ScaledModelProvider
from .prompt_caches import PlannedPromptCache
from .requests import BODY_LIMIT, BOUNDS


class Handler(stock.APIHandler):
    """Answers what mlx-lm's handler leaves open with a proper status."""

    def do_POST(self) -> None:  # noqa: N802 - the name http.server calls
        """Check what arrives before mlx-lm reads it."""
        length = self.headers.get("Content-Length", "")
        if re.fullmatch("-?[0-9]{1,18}", length) and not 0 <= int(length) <= BODY_LIMIT:
            status = 400 if int(length) < 0 else 413
            self._refuse(status, f"A request body has 0 to {BODY_LIMIT} bytes, got {length}.")
            self.close_connection = True
            return
        try:
            super().do_POST()
        except Refusal as refusal:
            self._refuse(refusal.status, str(refusal), code=refusal.code)
        except UnicodeDecodeError as error:
            self._refuse(400, f"The request body is no UTF-8: {error}.")
        except RunError as error:
            # Of an answer that is not on its way yet, the status can still be told.
            if getattr(self, "_headers_buffer", None):
                self._headers_buffer: list[bytes] = []
                self._refuse(500, str(error))
            self.close_connection = True
        except RecursionError:
            self._refuse(400, "The request body is nested too deeply.")
        except (BrokenPipeError, ConnectionResetError):
            # The client hung up; mlx-lm has told the generation to stop.
            self.close_connection = True

    def validate_model_parameters(self) -> None:
        """mlx-lm's checks, and the bounds that it leaves open.

        Raises:
            ValueError: a parameter of the request cannot be used.
        """
        super().validate_model_parameters()
        for name, most in BOUNDS.items():
            value = getattr(self, name)
            # Not `value > most`: of NaN that is false.
            if value is not None and not -most <= value <= most:
                raise ValueError(f"{name} must be a number within {-most:g}..{most:g}")
        if self.seed is not None and self.seed < 0:
            raise ValueError("seed must be at least 0")

    def handle_models_request(self) -> None:
        """The models that a request may name: the one served, with its context limit, and
        those in the hub's cache on this machine."""
        provider = self.response_generator.model_provider
        served = provider.cli_args.model
        models: list[dict[str, Any]] = []
        if served:
            models.append({"id": served, "max_model_len": provider.reach})
        try:
            repos = scan_cache_dir().repos
        except CacheNotFound:
            repos = frozenset()
        models += [{"id": r.repo_id} for r in repos if r.repo_type == "model"]
        wanted = self.path.removeprefix("/v1/models").strip("/")
        if wanted:
            models = [model for model in models if model["id"] == wanted]
        data = [{**model, "object": "model", "created": self.created} for model in models]
        self._set_completion_headers(200)
        self.end_headers()
        self.wfile.write(json.dumps({"object": "list", "data": data}).encode())

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": error}).encode())


def serve(host: str, port: int, provider: ScaledModelProvider) -> None:
    """Start generation, wait for the model, then answer requests until interrupted.

    Raises:
        InputError: the model does not load, or the port is not free.
        RunError: one of several processes failed.
    """
    first = mx.distributed.init().rank() == 0
    cache = PlannedPromptCache(provider, provider.cli_args.prompt_cache_size)
    generator = PlanningResponseGenerator(provider, cache)
    try:
        while provider.cli_args.model and provider.model_key is None:
            if not generator.generation_available():
                raise InputError(f"The model does not load: {generator.failure}")
            time.sleep(0.05)
        if first:
            stock._run_http_server(host, port, generator, handler_class=Handler)
        else:
            generator.join()
    except OSError as error:
        raise InputError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
    finally:
        if first:
            generator.stop_and_join()
    if generator.failure is not None:
        raise RunError(f"The processes are out of step: {generator.failure}")
