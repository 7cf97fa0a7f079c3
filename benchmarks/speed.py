"""Cases of the suite: speed of a model with CLEX, or another method, against the stock model."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import mlx_clex  # isort: skip  (before mlx.core: on Linux it looks for OpenBLAS)

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import trim_prompt_cache

from mlx_clex.scaling import SCALINGS

from .blocks import AGAIN, OURS, STOCK, Comparison, interleave

CHUNK = 512  # tokens in one pass of prefill


@dataclass
class Setup:
    """What the cases run on."""

    model: str  # a folder, a .gguf file, a hub id or bundled:NAME, in float32
    lengths: tuple[int, ...]  # tokens
    blocks: int = 9  # of each kind
    tokens: int = 32  # decoded in a block
    trained_length: int = 1024  # L0 of the attached scaling

    @cached_property
    def stock(self) -> Any:
        """The stock model."""
        model: Any = mlx_clex.load(self.model)[0]
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
        return model

    def scaled(self, name: str = "clex") -> Any:
        """Return another model with the same weights in memory and a scaling."""
        model: Any = mlx_clex.load(self.model)[0]
        model.update(self.stock.parameters())
        return mlx_clex.attach(model, {"type": name}, trained_length=self.trained_length)

    @cached_property
    def ids(self) -> mx.array:
        """Random tokens for all lengths."""
        longest = max(*self.lengths, 4 * self.trained_length)
        size = self.stock.args.vocab_size
        return mx.random.randint(0, size, (longest + 1,), key=mx.random.key(0))


class Bench:
    """A model and its cache."""

    def __init__(self, setup: Setup, model: nn.Module, length: int, *, planned: bool) -> None:
        """Read `length` tokens, at the scale of their length if `planned`."""
        self.model, self.ids = model, setup.ids
        self.cache = mlx_clex.make_prompt_cache(model, length if planned else None)
        self.read(0, length)

    def _trim(self, length: int) -> None:
        trim_prompt_cache(self.cache, int(self.cache[0].offset) - length)

    def read(self, start: int, stop: int) -> None:
        """Trim the cache to `start` tokens and read up to `stop` in chunks."""
        self._trim(start)
        for at in range(start, stop, CHUNK):
            self.model(self.ids[None, at : min(at + CHUNK, stop)], cache=self.cache)
            mx.eval([cache.state for cache in self.cache])

    def decode(self, start: int, count: int) -> None:
        """Trim the cache to `start` tokens and decode `count` tokens with mlx-lm's loop."""
        self._trim(start)
        last = self.ids[start : start + 1]
        for _ in generate_step(last, self.model, max_tokens=count, prompt_cache=self.cache):
            pass


def _benches(setup: Setup, scaled: Any, length: int, *, planned: bool = True) -> dict[str, Bench]:
    plain = Bench(setup, setup.stock, length, planned=planned)
    return {STOCK: plain, OURS: Bench(setup, scaled, length, planned=planned), AGAIN: plain}


def decode(setup: Setup) -> Iterator[Comparison]:
    """Decode after texts of each length."""
    scaled = setup.scaled()
    for length in setup.lengths:
        benches = _benches(setup, scaled, length)
        seconds = interleave(
            setup.blocks,
            lambda kind: benches[kind].decode(length, setup.tokens),  # noqa: B023
        )
        yield Comparison("decode", length, seconds, goal=0.99)


def step(setup: Setup) -> Iterator[Comparison]:
    """Decode across a step of the scale, which rotates the cached keys."""
    start = 2 * setup.trained_length - setup.tokens // 2
    benches = _benches(setup, setup.scaled(), start, planned=False)
    seconds = interleave(
        setup.blocks,
        lambda kind: benches[kind].decode(start, setup.tokens),
        # One token moves the keys back to the scale before the step.
        lambda kind: benches[kind].decode(start, 1),
    )
    yield Comparison("step", start, seconds, goal=0.98)


def prefill(setup: Setup) -> Iterator[Comparison]:
    """Read the last chunk of texts of each length."""
    scaled = setup.scaled()
    for length in setup.lengths:
        benches = _benches(setup, scaled, length)
        start = max(0, length - CHUNK)
        seconds = interleave(setup.blocks, lambda kind: benches[kind].read(start, length))  # noqa: B023
        yield Comparison("prefill", length, seconds, goal=0.99)


def method(setup: Setup, name: str) -> Iterator[Comparison]:
    """Decode with one method after a text of the greatest length."""
    length = setup.lengths[-1]
    benches = _benches(setup, setup.scaled(name), length)
    seconds = interleave(setup.blocks, lambda kind: benches[kind].decode(length, setup.tokens))
    yield Comparison(f"method-{name}", length, seconds, goal=0.99)


CASES = {"decode": decode, "step": step, "prefill": prefill} | {
    f"method-{name}": partial(method, name=name) for name in SCALINGS
}
