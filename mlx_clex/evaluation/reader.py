"""Greedy answers to one prompt after the other, each read at the scale of its own length.

Prompts that begin alike share what was read of it, where the answer is the same then.

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


@dataclass
class Reader:
    """Answers prompts, greedily, and reads no beginning twice where that is exact.

    It is exact where the whole cache was computed at the scale and gain that the new
    prompt is read at. A quantised cache never is: which tokens were read before their
    predecessors had lost precision depends on how the prompt came in.
    """

    model: nn.Module
    tokenizer: Any
    grow: bool = False  # the scale of what has been read so far, not that of the prompt
    prefill_step_size: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START
    reuse: bool = True

    def __post_init__(self) -> None:
        self._tokens: list[int] = []  # of the last prompt, and its caches
        self._caches: list[Any] = []

    def answer(
        self,
        prompt: list[int],
        max_tokens: int,
        progress: Callable[[int], Any] = lambda read: None,
        until: Sequence[str] = (),
    ) -> str:
        """The text that follows.

        Args:
            prompt: ids.
            max_tokens: how many are generated, at most.
            progress: told how many tokens of the prompt are read.
            until: the text ends before the first of these strings.

        Raises:
            RunError: MLX failed, for want of memory above all.
        """
        caches, start = self._caches_for(prompt, max_tokens)
        self._tokens, self._caches = [], []  # no use if this one fails
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
        """Caches for this prompt, and how many of its tokens are in them."""
        length: int | None = len(prompt)
        if self.grow:
            length = None
        elif self.kv_bits is not None:
            length = len(prompt) + max_tokens  # quantised keys lose precision at every move
        # One token is left to predict from.
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        caches = self._caches
        if (
            self.reuse
            and self.kv_bits is None
            and shared
            and can_trim_prompt_cache(caches)
            and plan_of(self.model, caches) == plan_at(self.model, length or 0)
        ):
            trim_prompt_cache(caches, single_caches(caches)[0].offset - shared)
            for cache in planned_caches(caches):
                cache.expected_length = length or 0
            return caches, shared
        self._tokens, self._caches, caches = [], [], []  # the memory of the old ones is needed
        return make_prompt_cache(self.model, length), 0
