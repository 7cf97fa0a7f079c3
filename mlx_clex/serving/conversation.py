"""A conversation with a model, in one cache, where no token is read twice.

Each turn feeds only what is new. The chat template is rendered around the new message, and
the text before and after that message is read behind the cached tokens, the generated ones
included. So a turn costs its own tokens, however long the context is.

Under the `prompt` policy a turn is planned for the length at which it starts. If that
length needs a larger scale, the cached keys are rotated to the new scale; the cached values
are not recomputed. To compute a whole text at one scale, read it in one turn, or fix the
scale.

Not covered: several conversations in one batch (`server.py`).
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate, wired_limit
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..checkpoint.fingerprint import Fingerprint
from ..data.text import encode_text, normalise_text, without_bos
from ..errors import InputError, RunError, generating
from ..model.plans import planned_caches
from ..model.scaled_model import make_prompt_cache, scaled
from .prompt import pass_size, render_messages
from .saved_conversation import read_conversation, write_conversation

# Stand for the last message and the new one while the chat template is rendered.
_LAST, _NEW = "mlxclexlastmessage", "mlxclexnewmessage"
_DOCUMENT_END = "\n\n"  # between a document and the message about it

# (tokens read, tokens to read)
Progress = Callable[[int, int], None]


class Stopped(Exception):  # noqa: N818 - the user asked for it
    """Reading was stopped; the conversation is as it was before."""


@dataclass(frozen=True)
class Context:
    """How full a conversation's context is."""

    tokens: int
    reach: int | None  # tokens; None: no limit
    hard: bool  # the model refuses texts past the reach
    scale: float  # length / trained length at which the keys are rotated
    nbytes: int  # of keys and values

    def __str__(self) -> str:
        """One line for a status display."""
        reach = "no limit" if self.reach is None else f"reach {self.reach}"
        return (
            f"{self.tokens} tokens, {reach}, scale {self.scale:g}, "
            f"{self.nbytes / 1e6:.1f} MB of keys and values"
        )


class Conversation:
    """Messages and the cache that holds them; both change together or not at all."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        identity: Fingerprint | None = None,
        policy: str | float = "prompt",
        system_prompt: str | None = None,
        max_tokens: int = 256,
        prefill_step_size: int = 2048,
        sampler: Callable[[mx.array], mx.array] | None = None,
        check_length: Callable[[int], object] = lambda length: None,
    ) -> None:
        """Start one.

        Args:
            model: from `load`.
            tokenizer: from `load`.
            identity: the model's fingerprint, which saved conversations carry.
            policy: "prompt", "grow", or the scale the model was loaded with.
            system_prompt: put before the first message; needs a chat template.
            max_tokens: longest answer in tokens, -1 for no limit.
            prefill_step_size: most tokens read in one pass.
            sampler: picks a token; None takes the likeliest.
            check_length: called with the tokens that the conversation will have, before they
                are read; raises InputError where they do not fit the machine.

        Raises:
            InputError: a system prompt for a model without a chat template.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.identity = identity or {}
        self.policy = policy
        self.max_tokens = max_tokens
        self.prefill_step_size = prefill_step_size
        self.sampler = sampler
        self._check_length = check_length
        self.templated = bool(tokenizer.has_chat_template)
        self.stop = threading.Event()  # set it to stop reading or answering, between passes
        self.begin(system_prompt)

    def begin(self, system_prompt: str | None) -> None:
        """Start anew with this system prompt, or with none.

        Raises:
            InputError: the model has no chat template; nothing has changed.
        """
        if system_prompt and not self.templated:
            raise InputError(
                "A system prompt needs a chat template, and this model's tokenizer has none. "
                "Leave it out."
            )
        self.system_prompt = system_prompt or None
        self.reset()

    def reset(self) -> None:
        """Forget everything but the settings."""
        self.messages: list[dict[str, str]] = []
        self.tokens: list[int] = []
        self.finish: str | None = None  # of the last answer: stop, length, reach, stopped
        self.generated = 0  # tokens of the last answer
        self.speed = 0.0  # tokens a second of the last answer
        self._ended = False  # the last token is one that ends an answer
        self._open = False  # the last message is a document that waits for a question
        self._asked = 0  # tokens up to the beginning of the last answer; 0: there is none
        self._drop_cache()

    def context(self) -> Context:
        """Return how full the context is."""
        tokens = len(self.tokens)
        nbytes = sum(cache.nbytes for cache in self._cache) if self._cached else 0
        view = scaled(self.model)
        scales = [cache.scale for cache in planned_caches(self._cache)]
        scale = scales[0] if self._cached and scales else view.scale_at(max(tokens, 1))
        return Context(tokens, view.reach, view.limit is not None, scale, nbytes)

    def read(self, document: str, progress: Progress | None = None) -> int:
        """Read a document into the context, as the beginning of the next message.

        Returns:
            The number of tokens read.

        Raises:
            InputError: it does not fit, or is empty; nothing has changed.
            Stopped: `stop` was set; nothing has changed.
        """
        self.stop.clear()
        document = normalise_text(document)
        if not document.strip():
            raise InputError("The document is empty.")
        document += _DOCUMENT_END
        before, _ = self._frame()
        new, keep = self._encode(before, document)
        wanted = self.tokens[:keep] + new
        # One more token is needed for a question, and one for its answer.
        self._room(len(wanted) + 1)
        self._read(wanted, keep, hold=0, progress=progress)
        self.tokens = wanted
        self.messages = self._with_user(document)
        self._open, self._ended, self._asked = True, False, 0
        return len(new)

    def answer(self, message: str, progress: Progress | None = None) -> Iterator[str]:
        """Read a message and yield the answer in pieces.

        The conversation keeps what was yielded, also if `stop` or the caller ends the answer
        early. `finish` then says how the answer ended.

        Raises:
            InputError: the message does not fit; nothing has changed.
            Stopped: `stop` was set before the answer began; nothing has changed.
            RunError: MLX failed, mostly for want of memory; nothing has changed.
        """
        self.stop.clear()
        message = normalise_text(message)
        before, after = self._frame()
        new, keep = self._encode(before, message, after)
        yield from self._answer(self.tokens[:keep] + new, keep, self._with_user(message), progress)

    def retry(self, progress: Progress | None = None) -> Iterator[str]:
        """Replace the last answer by a new one to the same message; see `answer`.

        Raises:
            InputError: the last message has no answer; nothing has changed.
        """
        self.stop.clear()
        if not self._asked:
            raise InputError("There is no answer to replace. Send a message first.")
        asked = self._asked
        yield from self._answer(self.tokens[:asked], asked, self.messages[:-1], progress)

    def _answer(
        self,
        wanted: list[int],
        keep: int,
        messages: list[dict[str, str]],
        progress: Progress | None,
    ) -> Iterator[str]:
        """Read the tokens `wanted`, whose first `keep` are known, and yield an answer.

        Args:
            wanted: tokens up to the beginning of the answer.
            keep: how many of them the conversation has already.
            messages: before the answer, which is added to them.
            progress: told how far reading is.
        """
        room = self._room(len(wanted))
        self._read(wanted, keep, hold=1, progress=progress)
        limit = self.max_tokens if room is None or 0 < self.max_tokens <= room else room
        parts = stream_generate(
            self.model,
            self.tokenizer,
            wanted[-1:],
            max_tokens=limit,
            sampler=self.sampler,
            prompt_cache=self._cache,
        )
        produced: list[int] = []
        text, failed = "", False
        self.finish = "stopped"
        try:
            with generating(lambda: f"after {len(produced)} tokens"):
                for part in parts:
                    produced.append(part.token)
                    text += part.text
                    self.generated, self.speed = part.generation_tokens, part.generation_tps
                    if part.finish_reason is not None:
                        cut = part.finish_reason == "length" and limit == room
                        self.finish = "reach" if cut else part.finish_reason
                    yield part.text
                    if self.stop.is_set():
                        break
        except (InputError, RunError):
            failed = True
            raise
        finally:
            parts.close()
            if failed or not produced:
                self._drop_cache()
            else:
                self.tokens = wanted + produced
                self._cached = len(self.tokens)
                self._ended = produced[-1] in self.tokenizer.eos_token_ids
                self.messages = [*messages, {"role": "assistant", "content": text}]
                self._open, self._asked = False, len(wanted)

    def save(self, file: str | Path) -> Path:
        """Write the conversation with its cache to a file, and return its path.

        Raises:
            InputError: there is nothing to save, or no such folder.
            RunError: the file cannot be written.
        """
        if not self.tokens:
            raise InputError("There is nothing to save yet.")
        state = {
            "messages": self.messages,
            "tokens": self.tokens,
            "cached": self._cached,
            "ended": self._ended,
            "open": self._open,
            "asked": self._asked,
            "system_prompt": self.system_prompt,
        }
        return write_conversation(file, self._cache, self.identity, state)

    def restore(self, file: str | Path) -> None:
        """Go on with a conversation that `save` wrote; nothing of it is read again.

        Raises:
            InputError: no such file, a damaged one, or one of another model or scaling: the
                message says what differs. Nothing has changed.
        """
        cache, state = read_conversation(file, self.model, self.identity)
        self.reset()
        if state["cached"]:
            self._cache, self._cached = cache, state["cached"]
        self.messages, self.tokens = state["messages"], state["tokens"]
        self._ended, self._open, self._asked = state["ended"], state["open"], state["asked"]
        self.system_prompt = state["system_prompt"]

    def _with_user(self, text: str) -> list[dict[str, str]]:
        """Return the messages with this one of the user, which an open one goes on with."""
        if not self._open:
            return [*self.messages, {"role": "user", "content": text}]
        last = self.messages[-1]
        return [*self.messages[:-1], {**last, "content": last["content"] + text}]

    def _frame(self) -> tuple[str, str]:
        """Return the text between the context and a new user message, and after that."""
        if not self.templated:
            return ("\n" if self.messages and not self._open else ""), ""
        messages = [dict(message) for message in self.messages]
        if self._open:
            messages[-1]["content"] = _LAST + _NEW
        else:
            if messages:
                messages[-1]["content"] = _LAST
            messages.append({"role": "user", "content": _NEW})
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        rendered = render_messages(self.tokenizer, messages, add_generation_prompt=True)
        if rendered.count(_NEW) != 1 or rendered.count(_LAST) != bool(self.messages):
            raise InputError(
                "This model's chat template does not show each message once, so a conversation "
                "cannot be read turn by turn."
            )
        before, after = rendered.split(_NEW)
        return before.rpartition(_LAST)[2], after

    def _encode(self, before: str, text: str, after: str = "") -> tuple[list[int], int]:
        """Return the tokens to read, and how many of the context's they stand behind."""
        keep, behind = len(self.tokens), "\n" if self.tokens else None
        if self._ended:
            end = self.tokenizer.decode(self.tokens[-1:])
            if before.lstrip().startswith(end):
                before, behind = before.lstrip()[len(end) :], end
            else:
                keep -= 1  # this template has another way to end an answer
        begins = not self.tokens and not self.templated
        if not begins:
            text = without_bos(self.tokenizer, text)
        limit = scaled(self.model).limit
        new = encode_text(
            self.tokenizer, before + text + after, begins=begins, behind=behind, limit=limit
        )
        if not new:
            raise InputError("The message is empty.")
        return new, keep

    def _room(self, length: int) -> int | None:
        """Return the tokens left for an answer behind so many; None: no limit.

        Raises:
            InputError: the model or the machine cannot hold so many.
        """
        self._check_length(length + max(0, self.max_tokens))
        return scaled(self.model).room_after(length, "The conversation with this message")

    def _read(self, wanted: list[int], keep: int, *, hold: int, progress: Progress | None) -> None:
        """Bring all tokens but the last `hold`, of which `keep` are known, into the cache."""
        end = len(wanted) - hold
        keep = min(keep, end)
        self._trim(keep)
        for cache in planned_caches(self._cache):
            cache.expected_length = len(wanted) if self.policy == "prompt" else 0
        start, size = self._cached, self.prefill_step_size
        if self.policy != "grow":  # there the passes have a scale each
            size = pass_size(end - start, size)
        if progress is not None and start < end:
            progress(0, end - start)
        try:
            failing = generating(lambda: f"after {self._cached - start} tokens")
            with wired_limit(self.model), failing:
                while self._cached < end:
                    chunk = wanted[self._cached : min(self._cached + size, end)]
                    self.model(mx.array([chunk]), cache=self._cache)
                    mx.eval([cache.state for cache in self._cache])
                    mx.clear_cache()
                    self._cached += len(chunk)
                    if progress is not None:
                        progress(self._cached - start, end - start)
                    if self.stop.is_set():
                        self._trim(keep)
                        raise Stopped
        except (RunError, KeyboardInterrupt):
            # In the middle of a pass: some layers have its tokens, some do not.
            self._drop_cache()
            raise

    def _trim(self, length: int) -> None:
        """Let the cache hold at most so many tokens."""
        if self._cached <= length:
            return
        if can_trim_prompt_cache(self._cache):
            trim_prompt_cache(self._cache, self._cached - length)
            self._cached = length
        else:
            self._drop_cache()

    def _drop_cache(self) -> None:
        """Begin with an empty cache; the next turn reads the conversation again."""
        self._cache = make_prompt_cache(self.model)
        self._cached = 0  # leading tokens of the conversation that the cache holds
