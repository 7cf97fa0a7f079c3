"""mlx_lm.server's model provider and generation thread, planned for long prompts.

Not covered: other models, adapters and draft models over several processes.
"""

import _thread
import gc
import logging
import math
import weakref
from collections.abc import Callable
from queue import Queue
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.server as stock

from ..data.text import TextTokenizer, longest_token
from ..errors import InputError, RunError, watchdog_advice
from ..loading import load
from ..model.scaled_model import make_prompt_cache, scaled
from ..model.stock import config_value
from .answer_text import AnswerText
from .fields import RequestError
from .jobs import Ticket
from .prompt_caches import PlannedPromptCache
from .requests import check_tokens
from .schedule import DueBatchGenerator

# mlx_lm.server has no option for it.
stock.BatchGenerator = DueBatchGenerator


class ScaledModelProvider(stock.ModelProvider):
    """Loads models with `mlx_clex.load`."""

    scale: float | None = None
    loads = 0  # how often a model was loaded
    first_limit: int | None = None  # of what the server was started with, tokens; see `limit`
    longest_token = 1  # bytes of text, at most, that one token stands for
    # Returns the bytes that MLX can use beside so many tokens of the loaded model; raises
    # InputError where they do not fit this machine.
    check_length: Callable[[int], float] = staticmethod(lambda length: math.inf)
    before_reading: Callable[[nn.Module], None] | None = None  # see `load`

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[nn.Module, Any]:
        """Load exactly these, unless they are loaded; mlx-lm's names for defaults are resolved
        where a request is checked.

        Raises:
            RequestError: they do not load, HTTP 404.
        """
        if self.model_key != (model_path, adapter_path, draft_model_path):
            try:
                self._load(model_path, adapter_path, draft_model_path)
            except InputError as error:
                raise RequestError(
                    str(error), param="model", code="model_not_found", status=404
                ) from error
        return self.model, self.tokenizer

    def load_default(self) -> None:
        """Load what the server was started with."""
        args = self.cli_args
        if args.model is not None:
            self.load(args.model, args.adapter_path, args.draft_model)

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        self.reset()
        gc.collect()
        mx.clear_cache()
        trust = self.cli_args.trust_remote_code
        model, tokenizer = load(
            model_path,
            scale=self.scale,
            adapter_path=adapter_path,
            trust_remote_code=trust,
            tokenizer_config=self._tokenizer_config,
            group=mx.distributed.init(),
            pipeline=self.cli_args.pipeline,
            before_reading=self.before_reading,
        )
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
        _fill_detokenizer(tokenizer, config_value(model, "vocab_size") or 0)
        self.longest_token = longest_token(tokenizer)
        self.model, self.tokenizer, self.draft_model = model, tokenizer, draft
        if (model_path, adapter_path) == (self.cli_args.model, self.cli_args.adapter_path):
            self.first_limit = self.limit
        self.loads += 1
        self.model_key = (model_path, adapter_path, draft_model_path)

    @property
    def models(self) -> list[nn.Module]:
        """The models whose caches make up one prompt cache."""
        return [model for model in (self.model, self.draft_model) if model is not None]

    @property
    def limit(self) -> int | None:
        """The longest sequence that all loaded models accept, in tokens; None: any length."""
        limits = [scaled(model).limit for model in self.models]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def limited(self) -> str:
        """Whose limit `limit` is, as messages begin."""
        if self.model is None or scaled(self.model).limit == self.limit:
            return "This model's"
        return f"The draft model {self.model_key[2]}'s"


def _fill_detokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Give tokens that the model has and the tokenizer lacks an empty text.

    Models have such tokens where their vocabulary is padded, and sampling can pick them. mlx-lm
    then fails with an IndexError, which ended the answers of all clients.
    """
    texts = getattr(tokenizer.detokenizer, "tokenmap", None)  # the same list for all answers
    if texts:
        empty = b"" if isinstance(texts[0], bytes) else ""
        texts[:] = [empty if text is None else text for text in texts]
        texts += [empty] * (vocabulary - len(texts))


class PlanningResponseGenerator(stock.ResponseGenerator):
    """Refuses what the model cannot answer, says why loading failed, and survives a request.

    What fails while tokens are made fails the requests under way, and no later one; over
    several processes, which are out of step then, it ends the server.
    """

    def __init__(self, provider: ScaledModelProvider, prompt_cache: PlannedPromptCache) -> None:
        self.failure: Exception | None = None
        self._under_way: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self._alone: Ticket | None = None  # the job that is served outside of a batch
        self._answer: AnswerText | None = None  # of the job that is being admitted
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
                for ticket in list(self._under_way):
                    ticket.put(RunError(f"Generation failed: {error}{watchdog_advice(error)}"))
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
        if isinstance(request[0], Ticket):
            self._under_way.add(request[0])
            if request[0].stopped and not self._is_distributed:
                return None
        return request

    def stop_and_join(self) -> None:
        """End generation, in every process after the same step."""
        if self._is_distributed and self.generation_available():
            self.requests.put((Queue(), None, None))
            self.join()
            return
        self._stop = True
        if (ticket := self._alone) is not None:
            ticket.put(RunError("The server ended."))
            ticket.stop()
        super().stop_and_join()

    def _serve_single(self, request: Any, stream: Any) -> None:
        ticket = request[0]
        if isinstance(ticket, Ticket) and not self._is_distributed:
            ticket.alone, self._alone = True, ticket
            if self._stop:
                ticket.stop()
        super()._serve_single(request, stream)
        self._alone = None

    def can_stop(self, args: Any) -> bool:
        """Whether a job can end before its last token."""
        return not self._is_distributed or self._is_batchable(args)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """Check and tokenise a job, and try its sampling; what fails here fails alone."""
        try:
            return self._admit(tokenizer, request, args)
        except InputError:
            raise
        except Exception as error:
            # A chat template raises whatever it likes about messages that it does not expect.
            logging.debug("A request was refused", exc_info=True)
            what = "messages" if request.request_type == "chat" else "prompt"
            raise RequestError(
                f"The {what} cannot be used with this model: {type(error).__name__}: {error}",
                param=what,
            ) from error

    def _admit(self, tokenizer: Any, request: Any, args: Any) -> Any:
        provider = self.model_provider
        model, reach = provider.model, provider.limit
        tokenizer = _Bounded(tokenizer, reach, provider.longest_token, provider.limited)
        if isinstance(request.prompt, list):
            tokenized: Any = (request.prompt, [request.prompt], ["assistant"], "normal", None)
        else:
            if request.tools and not tokenizer.has_chat_template:
                raise RequestError("This model has no chat template for tools.", param="tools")
            tokenized = super()._tokenize(tokenizer, request, args)
        prompt = tokenized[0]
        if not prompt:
            # Nothing to predict from, such as "" for a tokenizer that adds no beginning.
            begin = tokenizer.bos_token_id
            prompt = [tokenizer.eos_token_id if begin is None else begin]
            tokenized = (prompt, [prompt], ["assistant"], tokenized[3], None)
        if reach is not None:
            room = reach - len(prompt)
            if room < 1:
                raise _too_long(reach, f"the prompt has {len(prompt)}", provider.limited)
            args.max_tokens = min(args.max_tokens, room)
        self._check_memory(len(prompt) + args.max_tokens)
        check_tokens(model, tokenizer, prompt, args)
        _try_sampling(model, tokenizer, args)
        # Quantised keys lose precision at every move; and drafted tokens that are refused
        # later must not have moved the scale. So none is to come.
        fixed = self.cli_args.kv_bits or provider.draft_model is not None
        self.prompt_cache.room = args.max_tokens if fixed else 0
        continued = () if request.request_type == "chat" else prompt
        self._answer = AnswerText(tokenizer, args.stop_words, tokenized[3], continued)
        return tokenized

    def _check_memory(self, length: int) -> None:
        """Refuse a request that does not fit this machine; drop kept caches for one that does.

        Several processes must keep the same caches, and their memory may differ: they drop none.
        """
        try:
            left = self.model_provider.check_length(length)
        except InputError as error:
            message = str(error).partition(" --force")[0]
            raise RequestError(message, param="prompt", code="context_length_exceeded") from error
        if not self._is_distributed and left < math.inf:
            self.prompt_cache.trim_to(n_bytes=max(0, int(left)))

    def _make_state_machine(self, model_key: Any, tokenizer: Any, stop_words: Any) -> Any:
        """Return what ends and divides the text of the job just tokenised: one object for both."""
        return self._answer, self._answer


class _Bounded(TextTokenizer):
    """A tokenizer that refuses a text before it tokenises it, if the text is too long anyway.

    Tokenising 60 MB took five minutes and 10 GB.
    """

    def __init__(
        self, tokenizer: Any, reach: int | None, longest: int, whose: str = "This model's"
    ) -> None:
        """Take a limit.

        Args:
            tokenizer: mlx-lm's wrapper.
            reach: tokens of a prompt; None: any number.
            longest: bytes that a token stands for, at most.
            whose: the reach is, as messages begin.
        """
        super().__init__(tokenizer)
        self._reach, self._longest, self._whose = reach, longest, whose

    def __len__(self) -> int:
        return len(self._inner)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text."""
        self._check(text)
        return super().encode(text, add_special_tokens)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """Return the tokens of messages."""
        if self._reach is not None:
            self._check(super().apply_chat_template(messages, **options | {"tokenize": False}))
        return super().apply_chat_template(messages, **options)

    def _check(self, text: str) -> None:
        size = len(text.encode())
        if self._reach is not None and size > self._reach * self._longest:
            raise _too_long(
                self._reach,
                f"the prompt has {size} bytes, and no token stands for more than {self._longest}",
                self._whose,
            )


def _too_long(reach: int, found: str, whose: str) -> RequestError:
    return RequestError(
        f"{whose} maximum context length is {reach} tokens, the generated ones included; "
        f"{found}. Shorten it.",
        param="prompt",
        code="context_length_exceeded",
    )


def _try_sampling(model: Any, tokenizer: Any, args: Any) -> None:
    """Sample from one row of zeros: options that MLX refuses would end the whole batch."""
    vocabulary = config_value(model, "vocab_size")
    if vocabulary is None:
        return
    logits = mx.zeros((1, vocabulary))
    for processor in stock._make_logits_processors(args):
        logits = processor(mx.array([0]), logits)
    mx.eval(stock._make_sampler(args, tokenizer)(logits))
