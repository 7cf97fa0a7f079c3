"""Cached prefixes of prompts, reused only where the new prompt has their scale and gain."""

from typing import Any, Protocol

import mlx.nn as nn
from mlx_lm.models.cache import LRUPromptCache, QuantizedKVCache

from ..model.plans import plan_at, plan_of, planned_caches, single_caches
from ..model.scaled_model import make_prompt_cache
from ..model.stock import stock_caches


class Provider(Protocol):
    """Where the loaded models come from."""

    loads: int  # how often a model was loaded

    @property
    def models(self) -> list[nn.Module]:
        """The models whose caches make up one prompt cache."""


class PlannedPromptCache(LRUPromptCache):
    """Hands out caches that are planned for the whole prompt, reusing fitting prefixes.

    Entries are kept apart by the scale and gain at which all of their tokens were
    computed; one that was computed at several is not kept. All are of the model that is
    loaded: its files and those of its adapters may have changed when they are read again.
    """

    def __init__(
        self,
        provider: Provider,
        max_size: int,
        *,
        max_bytes: int | None = None,
        quantised_from: int | None = None,
    ) -> None:
        """Start with no entry.

        Args:
            provider: has the loaded models.
            max_size: most prompts that are kept.
            max_bytes: most bytes of keys and values that are kept; None: no limit.
            quantised_from: length from which keys are quantised, tokens; None: never.
        """
        super().__init__(max_size, **({} if max_bytes is None else {"max_bytes": max_bytes}))
        self.provider = provider
        self._quantised_from = quantised_from
        self.room = 0  # tokens to plan for beyond the prompt, where keys must not move
        self._loads = 0  # the provider's, when the entries were made

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any], list[int]]:
        """Caches for these tokens, and those of them that are still to be read."""
        if self._loads != self.provider.loads:
            self.trim_to(n_sequences=0)
            self._loads = self.provider.loads
        length = len(tokens) + self.room
        key = (model, tuple(plan_at(each, length) for each in self.provider.models))
        caches, rest = None, tokens
        if self._quantised_from is None or len(tokens) <= self._quantised_from:
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
        prompt of the very same length could go on from them. A quantised cache is not kept:
        which keys were already quantised when a token was read depends on the chunks in
        which the prompt was read.
        """
        plans, start = [], 0
        for each in self.provider.models:
            caches = prompt_cache[start : start + len(stock_caches(each))]
            start += len(caches)
            plans.append(plan_of(each, caches))
        shareable = all(plan == () or (plan is not None and plan[1] is None) for plan in plans)
        quantised = any(
            isinstance(cache, QuantizedKVCache) for cache in single_caches(prompt_cache)
        )
        # Drafting can leave the caches of either model a token or two short: what goes on from
        # them would skip a token.
        if shareable and not quantised and _lengths(prompt_cache) <= {len(tokens)}:
            super().insert_cache((model, tuple(plans)), tokens, prompt_cache, **kwargs)


def _lengths(caches: list[Any]) -> set[int]:
    """Return the lengths that caches hold, tokens; layers that share keys have an empty cache."""
    return {
        int(cache.offset)
        for cache in single_caches(caches)
        if hasattr(cache, "offset") and not cache.empty()
    }
