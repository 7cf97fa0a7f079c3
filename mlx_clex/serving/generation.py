"""mlx_lm.server's model provider and generation thread, planned for long prompts.

Not covered: other models, adapters and draft models over several processes.
"""

import _thread
import gc
import logging
import weakref
from queue import Queue
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.server as stock

from ..errors import InputError, RunError
from ..loading import load
from ..model.scaled_model import ScaledModel, make_prompt_cache
from .prompt_caches import PlannedPromptCache
from .requests import ContextTooLongError, RequestError, check_tokens


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
            self.reach = model.reach if isinstance(model, ScaledModel) else None
        self.loads += 1
        self.model_key = (model_path, adapter_path, draft_model_path)

    @property
    def models(self) -> list[nn.Module]:
        """The models whose caches make up one prompt cache."""
        return [model for model in (self.model, self.draft_model) if model is not None]


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
        reach = model.reach if isinstance(model, ScaledModel) and model.scaling.hard_reach else None
        if reach is not None:
            room = reach - len(tokenized[0])
            if room < 1:
                raise ContextTooLongError(
                    f"This model's maximum context length is {reach} tokens, the "
                    f"generated ones included; the prompt has {len(tokenized[0])}. Shorten it."
                )
            args.max_tokens = min(args.max_tokens, room)
        check_tokens(model, args)
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
