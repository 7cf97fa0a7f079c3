"""Command: an OpenAI-compatible server for long contexts.

It is mlx_lm.server, its options and its program, with four parts replaced: models are
loaded by ours; every request is planned for its whole prompt; a cached prefix is reused
only where all of it was computed at the scale and gain of the new request, so an answer
never depends on what was served before; and a prompt beyond the reach is refused with
HTTP 400.

Under mlx.launch the first process listens and shares every request with the others; all of
them make the same tokens, each from its part of the model.

Not covered: other models, adapters and draft models over several processes.
"""

import _thread
import argparse
import contextlib
import gc
import json
import logging
import re
import sys
import time
import weakref
from queue import Queue
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.server as stock
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from mlx_lm.models.cache import LRUPromptCache

from .commands.options import scale_policy
from .commands.run_command import run_command
from .errors import InputError, RunError
from .loading import load
from .model.plans import plan_at, plan_of, planned_caches
from .model.scaled_model import make_prompt_cache, scaled
from .model.stock import config_value, stock_caches

# Of numbers in a request; beyond them MLX fails while it samples.
_BOUNDS: dict[str, float] = {
    "temperature": 100,
    "top_p": 1,
    "top_k": 1 << 31,
    "min_p": 1,
    "max_tokens": 1 << 31,
    "num_draft_tokens": 1000,
    "repetition_penalty": 1e6,
    "repetition_context_size": 1 << 31,
    "presence_penalty": 1e6,
    "presence_context_size": 1 << 31,
    "frequency_penalty": 1e6,
    "frequency_context_size": 1 << 31,
    "xtc_probability": 1,
    "xtc_threshold": 0.5,
    "seed": (1 << 63) - 1,
}
BODY_LIMIT = 64_000_000  # bytes of a request; a million tokens are about 5 MB of text


class RequestError(InputError):
    """A request that the model cannot answer."""

    code: str | None = None  # in OpenAI's words


class ContextTooLongError(RequestError):
    """A prompt that leaves no room within the model's reach."""

    code = "context_length_exceeded"


class Refusal(BaseException):
    """Carries an InputError past mlx-lm's `except Exception`, whose answer clients cannot read."""

    def __init__(self, error: InputError) -> None:
        super().__init__(str(error))
        self.code: str | None = "model_not_found"
        self.status = 404
        if isinstance(error, RequestError):
            self.code, self.status = error.code, 400


class ScaledModelProvider(stock.ModelProvider):
    """Loads models with `mlx_clex.load`."""

    scale: float | None = None
    loads = 0  # how often a model was loaded
    reach: int | None = None  # of the model that the server was started with, tokens

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[nn.Module, Any]:
        """As mlx-lm's, which leaves out adapters that a request wants on the default model."""
        if adapter_path is not None:
            model_path = self._model_map.get(model_path, model_path)
        return super().load(model_path, adapter_path, draft_model_path)

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        if self.is_distributed and self.loads:
            raise InputError("Several processes serve only the model that they were started with.")
        self.reset()
        gc.collect()
        mx.clear_cache()
        if model_path is None:
            raise InputError("The request names no model, and the server was given none.")
        trust = self.cli_args.trust_remote_code
        model, tokenizer = load(
            model_path,
            scale=self.scale,
            adapter_path=adapter_path,
            trust_remote_code=trust,
            tokenizer_config=self._tokenizer_config,
            group=mx.distributed.init(),
            pipeline=self.cli_args.pipeline,
        )
        if self.cli_args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        draft = None
        if draft_model_path is not None:
            draft, draft_tokenizer = load(draft_model_path, trust_remote_code=trust)
            if draft_tokenizer.vocab_size != tokenizer.vocab_size:
                raise InputError(
                    f"The draft model {draft_model_path} has {draft_tokenizer.vocab_size} tokens, "
                    f"the model {tokenizer.vocab_size}: they must share a tokenizer."
                )
        self.is_batchable = draft is None and all(
            hasattr(cache, "merge") for cache in make_prompt_cache(model)
        )
        self.model, self.tokenizer, self.draft_model = model, tokenizer, draft
        if (model_path, adapter_path) == (self.cli_args.model, self.cli_args.adapter_path):
            self.reach = scaled(model).reach
        self.loads += 1
        self.model_key = (model_path, adapter_path, draft_model_path)

    @property
    def models(self) -> list[nn.Module]:
        """The models whose caches make up one prompt cache."""
        return [model for model in (self.model, self.draft_model) if model is not None]


class PlannedPromptCache(LRUPromptCache):
    """Hands out caches that are planned for the whole prompt, reusing fitting prefixes.

    Entries are kept apart by the scale and gain at which all of their tokens were
    computed; one that was computed at several is not kept. All are of the model that is
    loaded: its files and those of its adapters may have changed when they are read again.
    """

    def __init__(self, provider: ScaledModelProvider, max_size: int) -> None:
        super().__init__(max_size)
        self.provider = provider
        self.room = 0  # tokens to plan for beyond the prompt, where keys must not move
        self._loads = 0  # the provider's, when the entries were made

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any], list[int]]:
        """Caches for these tokens, and those of them that are still to be read."""
        if self._loads != self.provider.loads:
            self.trim_to(n_sequences=0)
            self._loads = self.provider.loads
        length = len(tokens) + self.room
        key = (model, tuple(plan_at(each, length) for each in self.provider.models))
        caches, rest = super().fetch_nearest_cache(key, tokens)
        if caches is None or not rest:
            # Nothing to go on from; or all of it, and then no token to predict from.
            models = self.provider.models
            return [cache for each in models for cache in make_prompt_cache(each, length)], tokens
        for cache in planned_caches(caches):
            cache.expected_length = length
        return caches, rest

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
    ) -> None:
        """Keep these caches, if one plan made all of them and another prompt can share it.

        Under CLEX's log_scale the gain is that of the prompt's own length: nothing but a
        prompt of the very same length could go on from them.
        """
        plans, start = [], 0
        for each in self.provider.models:
            caches = prompt_cache[start : start + len(stock_caches(each))]
            start += len(caches)
            plans.append(plan_of(each, caches))
        shareable = all(plan == () or (plan is not None and plan[1] is None) for plan in plans)
        # Drafting leaves caches a token or two short, and a trim would take too many.
        whole = all(cache.offset == len(tokens) for cache in planned_caches(prompt_cache))
        if shareable and whole:
            super().insert_cache((model, tuple(plans)), tokens, prompt_cache, **kwargs)


class PlanningResponseGenerator(stock.ResponseGenerator):
    """Refuses what the model cannot answer, says why loading failed, and survives a request.

    What fails while tokens are made fails the requests under way, and no later one; over
    several processes, which are out of step then, it ends the server.
    """

    def __init__(self, provider: ScaledModelProvider, prompt_cache: PlannedPromptCache) -> None:
        self.failure: Exception | None = None
        self._under_way: weakref.WeakSet[Any] = weakref.WeakSet()  # their answers' queues
        super().__init__(provider, prompt_cache)

    def _run_generate(self) -> None:
        try:
            self._generate_until_stopped()
        finally:
            # What MLX keeps for a thread that ends unasked can end the interpreter with it.
            mx.clear_streams()

    def _generate_until_stopped(self) -> None:
        while not self._stop:
            try:
                self._generate()
            except Exception as error:
                loaded = self.model_provider.model is not None
                if loaded:
                    logging.exception("A request failed while tokens were made")
                for queue in list(self._under_way):
                    queue.put(RunError(f"Generation failed: {error}"))
                self._under_way.clear()
                if self._is_distributed or not loaded:
                    self.failure = error
                    self._generation_failed = True
                    if loaded and self._rank == 0:
                        _thread.interrupt_main()
                    return

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        if request is None:
            return None
        if request[1] is None:
            self._stop = True
            return None
        self._under_way.add(request[0])
        return request

    def stop_and_join(self) -> None:
        """End generation, in every process after the same step."""
        if self._is_distributed and self.generation_available():
            self.requests.put((Queue(), None, None))
            self.join()
        else:
            super().stop_and_join()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        tokenized = super()._tokenize(tokenizer, request, args)
        model = self.model_provider.model
        reach = scaled(model).limit if model is not None else None
        if reach is not None:
            room = reach - len(tokenized[0])
            if room < 1:
                raise ContextTooLongError(
                    f"This model's maximum context length is {reach} tokens, the "
                    f"generated ones included; the prompt has {len(tokenized[0])}. Shorten it."
                )
            args.max_tokens = min(args.max_tokens, room)
        _check_tokens(model, args)
        # Quantised keys lose precision at every move; and drafted tokens that are refused
        # later must not have moved the scale. So none is to come.
        fixed = self.cli_args.kv_bits or self.model_provider.draft_model is not None
        self.prompt_cache.room = args.max_tokens if fixed else 0
        return tokenized

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> Any:
        """As mlx-lm's; what the model cannot answer raises Refusal."""
        try:
            context, parts = super().generate(request, generation_args, progress_callback)
        except InputError as error:
            raise Refusal(error) from error
        if self._is_distributed and not self._is_batchable(generation_args):
            # Outside of batches, mlx-lm cannot tell the others that a client hung up.
            context.stop = lambda: None
        return context, parts


def _check_tokens(model: nn.Module | None, args: Any) -> None:
    """Refuse what MLX does not check: the first would end the process, the second all sampling.

    Raises:
        RequestError: a token that does not exist, or more of them than there are.
    """
    vocabulary = None if model is None else config_value(model, "vocab_size")
    if vocabulary is None:
        return
    for token in args.logits.logit_bias or {}:
        if not 0 <= token < vocabulary:
            raise RequestError(f"logit_bias has token {token}; there are {vocabulary}.")
    if args.sampling.top_k >= vocabulary:
        raise RequestError(f"top_k must be below {vocabulary}, the number of tokens.")


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
        for name, most in _BOUNDS.items():
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what mlx_lm.server does not have."""
    parser.add_argument(
        "--scale",
        type=scale_policy,
        default="prompt",
        metavar="prompt|NUMBER",
        help="prompt (default): each request has the scale of its whole prompt, then growing "
        "with the answer. NUMBER: fixed for good.",
    )


def stock_parser() -> argparse.ArgumentParser:
    """The parser of mlx_lm.server, which it builds inside its `main`."""
    built: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        built.append(parser)
        raise StopIteration

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        contextlib.suppress(StopIteration),
    ):
        stock.main()
    return built[0]


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted.

    Raises:
        InputError: the model, an option or the address cannot be used.
    """
    if args.scale == "grow":
        raise InputError("--scale grow would let an answer depend on how its prompt arrives.")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port must be within 0..65535, got {args.port}.")
    group = mx.distributed.init()
    check_processes(args, group.size())
    stock.maybe_set_recommended_wired_limit()
    logging.basicConfig(
        level=args.log_level if group.rank() == 0 else "ERROR",
        format="%(asctime)s - %(levelname)s - %(message)s",
    )
    provider = ScaledModelProvider(args)
    provider.scale = args.scale if isinstance(args.scale, float) else None
    serve(args.host, args.port, provider)


def check_processes(args: argparse.Namespace, size: int) -> None:
    """Refuse what several processes cannot do.

    Raises:
        InputError: the message says which option, and why.
    """
    if size == 1:
        return
    if args.model is None:
        raise InputError(f"mlx.launch started {size} processes: give their model as --model.")
    if args.draft_model is not None:
        raise InputError(f"--draft-model is for one process; mlx.launch started {size}.")
    if args.pipeline and args.prompt_cache_bytes is not None:
        raise InputError(
            "--prompt-cache-bytes would make processes with unequal numbers of layers forget "
            "different prompts: leave it out, or --pipeline; --prompt-cache-size counts prompts."
        )


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(
        run_command(
            add_arguments,
            run,
            prog="mlx_clex.server",
            description="Serve a model to OpenAI clients, each request at its own scale.",
            parents=[stock_parser()],
        )
    )


if __name__ == "__main__":
    main()
