"""A conversation with a model, in one cache, where no token is read twice.

Each turn feeds only what is new: the chat template is rendered around the new message,
and what it puts before and after is read behind the tokens that the cache already has,
generated ones included. So a turn costs its own tokens, however long the context is.

Under the `prompt` policy a turn is planned for the length it starts with. Where that asks
for a larger scale, the keys of earlier turns are moved to it; their values stay those
computed at the earlier scale, as in decoding across a step of the scale. To have all of a
text computed at one scale, read it in one turn, or fix the scale.

Not covered: several conversations in one batch (`server.py`).
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jinja2.exceptions import TemplateError
from mlx_lm.generate import stream_generate, wired_limit
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..checkpoint.fingerprint import Fingerprint
from ..checkpoint.prompt_cache import file_for, load_cache, save_cache
from ..errors import InputError, RunError
from ..model.scaled_model import make_prompt_cache, scaled

# Stand for the last message and the new one while the chat template is rendered.
_LAST, _NEW = "mlxclexlastmessage", "mlxclexnewmessage"
_DOCUMENT_END = "\n\n"  # between a document and what is said about it
_FORMAT = "2"  # of saved conversations
_ENTRY = "conversation"  # in the file's metadata

# (tokens read, tokens to read)
Progress = Callable[[int, int], None]


class Stopped(Exception):  # noqa: N818 - wanted by the user, no error
    """Reading was stopped; the conversation is as it was before."""


@dataclass(frozen=True)
class Context:
    """How full a conversation's context is."""

    tokens: int
    reach: int | None  # tokens; None: no end
    hard: bool  # nothing is served past the reach
    scale: float  # length / trained length that the keys are rotated for
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
    ) -> None:
        """Start one.

        Args:
            model: from `load`.
            tokenizer: from `load`.
            identity: the model's fingerprint, which saved conversations carry.
            policy: "prompt", "grow", or the scale the model was loaded with.
            system_prompt: put before the first message; needs a chat template.
            max_tokens: of an answer, -1 for no limit.
            prefill_step_size: tokens read in one pass.
            sampler: picks a token; None takes the likeliest.

        Raises:
            InputError: a system prompt for a model without a chat template.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.identity = identity or {}
        self.policy = policy
        self.system_prompt = system_prompt
        self.max_tokens = max_tokens
        self.prefill_step_size = prefill_step_size
        self.sampler = sampler
        self.templated = bool(tokenizer.has_chat_template)
        if system_prompt and not self.templated:
            raise InputError(
                "--system-prompt needs a chat template, and this model's tokenizer has none."
            )
        self.stop = threading.Event()  # set it to stop reading or answering, between passes
        self.reset()

    def reset(self) -> None:
        """Forget everything but the settings."""
        self.messages: list[dict[str, str]] = []
        self.tokens: list[int] = []
        self.finish: str | None = None  # of the last answer: stop, length, reach, stopped
        self.generated = 0  # tokens of the last answer
        self.speed = 0.0  # tokens a second of the last answer
        self._ended = False  # the last token is one that ends an answer
        self._open = False  # the last message is a document, to be gone on with
        self._drop_cache()

    def context(self) -> Context:
        """How full the context is."""
        tokens = len(self.tokens)
        nbytes = sum(cache.nbytes for cache in self._cache) if self._cached else 0
        view = scaled(self.model)
        scales = [cache.scale for cache in _leaves(self._cache) if hasattr(cache, "scale")]
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
        if not document.strip():
            raise InputError("The document is empty.")
        before, _ = self._frame()
        new, keep = self._encode(before, document + _DOCUMENT_END)
        # One more is needed for a question, and one for its answer.
        self._room(keep + len(new) + 1)
        self._read(new, keep, hold=0, progress=progress)
        self.tokens = self.tokens[:keep] + new
        self._say("user", document + _DOCUMENT_END)
        self._open, self._ended = True, False
        return len(new)

    def answer(self, message: str, progress: Progress | None = None) -> Iterator[str]:
        """Read a message and yield the answer in pieces.

        The conversation keeps what was yielded, also where `stop` or the caller ends it
        early. `finish` then says how it ended.

        Raises:
            InputError: the message does not fit; nothing has changed.
            Stopped: `stop` was set before the answer began; nothing has changed.
            RunError: MLX failed, out of memory above all; nothing has changed.
        """
        self.stop.clear()
        before, after = self._frame()
        new, keep = self._encode(before, message + after)
        wanted = self.tokens[:keep] + new
        room = self._room(len(wanted))
        self._read(new, keep, hold=1, progress=progress)
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
        except RuntimeError as error:
            failed = True
            raise RunError(f"MLX failed after {len(produced)} tokens: {error}") from error
        finally:
            parts.close()
            if failed or not produced:
                self._drop_cache()
            else:
                self.tokens = wanted + produced
                self._cached = len(self.tokens)
                self._ended = produced[-1] in self.tokenizer.eos_token_ids
                self._say("user", message)
                self._say("assistant", text)
                self._open = False

    def save(self, file: str | Path) -> Path:
        """Write the conversation with its cache to a file, and return its path.

        Raises:
            InputError: there is nothing to save, or no such folder.
            RunError: the file cannot be written.
        """
        if not self.tokens:
            raise InputError("There is nothing to save yet.")
        path = file_for(file)
        state = {
            "format": _FORMAT,
            "messages": self.messages,
            "tokens": self.tokens,
            "cached": self._cached,
            "ended": self._ended,
            "open": self._open,
            "system_prompt": self.system_prompt,
        }
        save_cache(path, self._cache, self.identity, {_ENTRY: json.dumps(state)})
        return path

    def restore(self, file: str | Path) -> None:
        """Go on with a conversation that `save` wrote; nothing of it is read again.

        Raises:
            InputError: no such file, or one of another model or scaling: the message says
                what differs. Nothing has changed.
        """
        cache, metadata = load_cache(file, self.model, self.identity)
        state = _checked_state(file, metadata)
        mx.eval([each.state for each in cache])
        self._cache, self._cached = cache, state["cached"]
        self.messages, self.tokens = state["messages"], state["tokens"]
        self._ended, self._open = state["ended"], state["open"]
        self.system_prompt = state["system_prompt"]

    def _say(self, role: str, text: str) -> None:
        """Add to the messages; an open one is gone on with."""
        if self._open and role == "user":
            self.messages[-1]["content"] += text
        else:
            self.messages.append({"role": role, "content": text})
        self._open = False

    def _frame(self) -> tuple[str, str]:
        """What stands between the context and a new user message, and after that."""
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
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            before, after = rendered.split(_NEW)
            if self.messages:
                _, before = before.split(_LAST)
        except (TemplateError, ValueError) as error:
            raise InputError(
                f"This model's chat template does not take the conversation: {error}"
            ) from error
        return before, after

    def _encode(self, before: str, text: str) -> tuple[list[int], int]:
        """The tokens to read, and how many of those in the context they stand behind."""
        keep = len(self.tokens)
        if self._ended:
            end = self.tokenizer.decode(self.tokens[-1:])
            if before.lstrip().startswith(end):
                before = before.lstrip()[len(end) :]
            else:
                keep -= 1  # this template has another way to end an answer
        first = not self.tokens and not self.templated
        # Not verbose: its warning names max_position_embeddings, which a scaling exceeds.
        new = self.tokenizer.encode(before + text, add_special_tokens=first, verbose=False)
        if not new:
            raise InputError("The message is empty.")
        return list(new), keep

    def _room(self, length: int) -> int | None:
        """Tokens left for an answer behind so many; None where there is no end."""
        return scaled(self.model).room_after(length, "The conversation with this message")

    def _read(self, new: list[int], keep: int, *, hold: int, progress: Progress | None) -> None:
        """Bring the first `keep` tokens and the new ones, but `hold`, into the cache."""
        wanted = self.tokens[:keep] + new
        end = len(wanted) - hold
        self._trim(keep)
        for cache in _leaves(self._cache):
            if hasattr(cache, "expected_length"):
                cache.expected_length = len(wanted) if self.policy == "prompt" else 0
        start = self._cached
        try:
            with wired_limit(self.model):
                while self._cached < end:
                    chunk = wanted[self._cached : min(self._cached + self.prefill_step_size, end)]
                    self.model(mx.array([chunk]), cache=self._cache)
                    mx.eval([cache.state for cache in self._cache])
                    mx.clear_cache()
                    self._cached += len(chunk)
                    if progress is not None:
                        progress(self._cached - start, end - start)
                    if self.stop.is_set():
                        self._trim(keep)
                        raise Stopped
        except RuntimeError as error:
            done = self._cached - start
            self._drop_cache()
            raise RunError(f"MLX failed after {done} tokens: {error}") from error
        except KeyboardInterrupt:
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


def read_text(file: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: it cannot be read, or is no text.
    """
    path = Path(file).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _checked_state(file: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a saved conversation says of itself.

    Raises:
        InputError: the file holds no conversation, or a damaged one.
    """
    try:
        state = json.loads(metadata[_ENTRY])
        messages, tokens = state["messages"], state["tokens"]
        whole = (
            all(type(state[key]) is bool for key in ("ended", "open"))
            and isinstance(state["system_prompt"], str | None)
            and all(set(m) == {"role", "content"} for m in messages)
            and all(isinstance(text, str) for m in messages for text in m.values())
            and all(type(token) is int and token >= 0 for token in tokens)
            and type(state["cached"]) is int
            and 0 <= state["cached"] <= len(tokens)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is no conversation that /save wrote.") from error
    if state.get("format") != _FORMAT:
        raise InputError(f"{file} was saved by another version of mlx_clex.")
    if not whole:
        raise InputError(f"{file} is a damaged conversation. Restore another one.")
    return state


def _leaves(caches: Any) -> Iterator[Any]:
    """Caches of layers that keep several, one by one."""
    for cache in caches:
        inside = getattr(cache, "caches", None)
        if inside is None:
            yield cache
        else:
            yield from _leaves(inside)
