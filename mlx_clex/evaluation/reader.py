"""Answer prompts greedily, one after the other, each at the scale of its own length.

A prompt reuses the cached keys of the prefix it shares with the last prompt, if that does
not change its answer.

Not covered: sampling, and several prompts at once.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..data.stop_strings import StopStrings
from ..errors import generating
from ..model.plans import plan_at, plan_of, planned_caches, single_caches
from ..model.scaled_model import make_prompt_cache


def advancing(bar: Any) -> Callable[[int], None]:
    """Return a callback that moves a bar to a number of tokens past its place now."""
    begin = bar.n
    return lambda tokens: bar.update(begin + tokens - bar.n)


@dataclass
class Reader:
    """Answer prompts greedily and reuse the cache of a shared prefix where that is exact.

    Reuse is exact if the whole cache was computed at the scale and gain of the new prompt. A
    quantised cache is never reused: which keys were already quantised when a token was read
    depends on the chunks in which the prompt was read.
    """

    model: nn.Module
    tokenizer: Any
    grow: bool = False  # use the scale of the length read so far, not of the whole prompt
    prefill_step_size: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START

    def __post_init__(self) -> None:
        self._tokens: list[int] = []  # of the last prompt
        self._caches: list[Any] = []  # of the last prompt

    def answer(
        self,
        prompt: list[int],
        max_tokens: int,
        progress: Callable[[int], Any] = lambda read: None,
        until: Sequence[str] = (),
    ) -> str:
        """Return the text that follows a prompt.

        Args:
            prompt: ids.
            max_tokens: how many are generated, at most.
            progress: called with the number of tokens of the prompt that are read.
            until: the text ends before the first of these strings.

        Raises:
            RunError: MLX failed, most often because memory ran out.
        """
        caches, start = self._caches_for(prompt, max_tokens)
        self._tokens, self._caches = [], []  # a failure leaves the caches in an unknown state
        parts = stream_generate(
            self.model,
            self.tokenizer,
            prompt[start:],
            max_tokens=max_tokens,
            prompt_cache=caches,
            prefill_step_size=self.prefill_step_size,
            kv_bits=self.kv_bits,
            kv_group_size=self.kv_group_size,
            quantized_kv_start=self.quantized_kv_start,
            prompt_progress_callback=lambda done, _: progress(start + done),
        )
        reply = ""
        stops = StopStrings(until)
        with generating(lambda: f"on a prompt of {len(prompt)} tokens"):
            for part in parts:
                reply += stops.add(part.text)
                if stops.found:
                    break
        reply += stops.end()
        self._tokens, self._caches = prompt, caches
        return reply

    def _caches_for(self, prompt: list[int], max_tokens: int) -> tuple[list[Any], int]:
        """Return caches for a prompt and the number of its tokens that they hold."""
        length: int | None = len(prompt)
        if self.grow:
            length = None
        elif self.kv_bits is not None:
            length = len(prompt) + max_tokens  # quantised keys lose precision at every move
        # The model must read at least one token to predict the next.
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        caches = self._caches
        if (
            self.kv_bits is None
            and shared
            and can_trim_prompt_cache(caches)
            and plan_of(self.model, caches) == plan_at(self.model, length or 0)
        ):
            trim_prompt_cache(caches, single_caches(caches)[0].offset - shared)
            for cache in planned_caches(caches):
                cache.expected_length = length or 0
            return caches, shared
        self._tokens, self._caches, caches = [], [], []  # free the old caches first
        return make_prompt_cache(self.model, length), 0
