"""Cases of the suite in one process: reading and decoding against the stock model."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx_clex  # isort: skip  (before mlx.core: on Linux it looks for OpenBLAS)

import mlx.core as mx
import mlx.nn as nn
from mlx_clex.convert import convert
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache, trim_prompt_cache
from mlx_lm.utils import quantize_model, save_config, save_model

from mlx_clex.checkpoint.folder import read_config
from mlx_clex.loading import resolve
from mlx_clex.scaling import SCALINGS

from .blocks import AGAIN, OURS, STOCK, Comparison, interleave

CHUNK = 512  # tokens in one pass of prefill
_GROUP = 32  # weights that share a scale; the rows of small models are not divisible by 64


@dataclass
class Setup:
    """What the cases run on."""

    model: str  # a folder, a .gguf file, a hub id or bundled:NAME, in float32
    lengths: tuple[int, ...]  # tokens
    blocks: int = 9  # of each kind
    tokens: int = 32  # decoded in a block
    trained_length: int = 1024  # L0 of the attached scaling
    trained: tuple[int, ...] = (512, 2048, 4096, 8192)  # tokens of a training sequence
    quick: bool = False
    cpu_time: bool = False  # count processor seconds, which depend less on other load

    def interleave(
        self,
        block: Callable[[str], object],
        prepare: Callable[[str], object] = lambda kind: None,
    ) -> dict[str, list[float]]:
        """Time blocks in turns; see `interleave`."""
        clock = time.process_time if self.cpu_time else time.perf_counter
        return interleave(self.blocks, block, prepare, clock)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = mlx_clex.load(self.model)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
        return model, tokenizer

    @property
    def stock(self) -> Any:
        """The stock model."""
        return self._loaded[0]

    @cached_property
    def _place(self) -> Any:
        return TemporaryDirectory()

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Folders by kind: the stock model as mlx-lm writes one, and the same with CLEX."""
        config = read_config(resolve(self.model))
        config = {k: v for k, v in config.items() if k not in ("model_file", "quantization")}
        stock, ours = Path(self._place.name) / "stock", Path(self._place.name) / "ours"
        save_model(stock, self.stock)
        save_config(config | {"torch_dtype": "float32"}, stock / "config.json")
        self._loaded[1].save_pretrained(stock)
        convert(stock, ours, scaling={"type": "clex"}, trained_length=self.trained_length)
        return {STOCK: stock, OURS: ours, AGAIN: stock}

    def scaled(self, name: str = "clex", bits: int | None = None) -> Any:
        """Return another model with the same weights in memory and a scaling."""
        entry: dict[str, Any] = {"type": name}
        if name == "clex":  # it refuses what is past its reach
            entry["max_factor"] = max(16, 1 + math.ceil(self._longest / self.trained_length))
        return mlx_clex.attach(self.another(bits), entry, trained_length=self.trained_length)

    def another(self, bits: int | None = None) -> Any:
        """Return another stock model with the same weights in memory, or with quantised ones."""
        model: Any = mlx_clex.load(self.model)[0]
        model.update(self.stock.parameters())
        return quantize_model(model, {}, _GROUP, bits)[0] if bits else model

    @cached_property
    def ids(self) -> mx.array:
        """Random tokens for all lengths."""
        size = self.stock.args.vocab_size
        return mx.random.randint(0, size, (self._longest + 1,), key=mx.random.key(0))

    @property
    def _longest(self) -> int:
        return max(*self.lengths, 4 * self.trained_length) + self.tokens


class Bench:
    """A model and its cache."""

    def __init__(
        self,
        setup: Setup,
        model: nn.Module,
        cache: list[Any] | None,
        length: int,
        *,
        planned: bool = True,
        kv_bits: int | None = None,
    ) -> None:
        """Read `length` tokens, at the scale of their length if `planned`; None: a new cache."""
        self.model, self.ids = model, setup.ids
        self.options: dict[str, Any] = {"kv_bits": kv_bits, "quantized_kv_start": 0}
        planned_for = length + setup.tokens if kv_bits else length
        self.cache = cache or mlx_clex.make_prompt_cache(model, planned_for if planned else None)
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
        for _ in generate_step(
            last, self.model, max_tokens=count, prompt_cache=self.cache, **self.options
        ):
            pass


class Batch:
    """Texts of a model that are decoded together by mlx-lm's batch generator."""

    def __init__(self, setup: Setup, model: Any, lengths: list[int]) -> None:
        """Read a text of each of these lengths, at its own scale."""
        self.generator = BatchGenerator(model, max_tokens=1 << 20, prefill_step_size=CHUNK)
        room = (setup.blocks + 2) * setup.tokens
        caches = [mlx_clex.make_prompt_cache(model, length + room) for length in lengths]
        prompts: Any = [setup.ids[:length].tolist() for length in lengths]
        self.generator.insert(prompts, caches=caches)
        while len(self.generator._generation_batch) < len(lengths):
            self.generator.next()

    def decode(self, count: int) -> None:
        """Decode so many tokens of each text."""
        for _ in range(count):
            self.generator.next_generated()


def rotating_again(model: Any) -> tuple[Any, list[Any]]:
    """Make a stock LLaMA rotate all cached keys at every pass; return it and its caches."""
    caches = []
    for layer in model.layers:
        rope = layer.self_attn.rope
        caches.append(RawCache(rope))
        layer.self_attn.rope = QueryRope(rope)
    return model, caches


class RawCache(KVCache):
    """A cache of raw keys, which are all rotated at every pass, as CLEX's release does.

    Source: the CLEX repository's CLEX/modeling_llama.py.
    """

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return all keys, rotated, and all values."""
        keys, values = super().update_and_fetch(keys, values)
        return self.rope(keys), values


class QueryRope(nn.Module):
    """A rope for queries alone, which mlx-lm's attention of LLaMA rotates before the keys."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self._rope, self._calls = rope, 0

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        self._calls += 1
        return self._rope(x, offset=offset) if self._calls % 2 else x


def _benches(
    setup: Setup, scaled: Any, length: int, stock: Any = None, **options: Any
) -> dict[str, Bench]:
    plain = Bench(setup, stock or setup.stock, None, length, **options)
    return {STOCK: plain, OURS: Bench(setup, scaled, None, length, **options), AGAIN: plain}


def decode(
    setup: Setup, kv_bits: int | None = None, bits: int | None = None
) -> Iterator[Comparison]:
    """Decode after texts of each length, with keys and values or with weights of so many bits."""
    stock, scaled = setup.another(bits), setup.scaled(bits=bits)
    for length in setup.lengths:
        benches = _benches(setup, scaled, length, stock, kv_bits=kv_bits)
        seconds = setup.interleave(
            lambda kind: benches[kind].decode(length, setup.tokens),  # noqa: B023
        )
        of = f", {kv_bits}-bit KV" if kv_bits else f", {bits}-bit weights" if bits else ""
        yield Comparison(f"decode{of}", length, seconds, goal=0.99)


def batch(setup: Setup) -> Iterator[Comparison]:
    """Decode eight texts together: of one length, and of unequal lengths, and so scales."""
    one = 2 * setup.trained_length
    unequal = [n * setup.trained_length // 2 for n in range(1, 9)]
    for name, lengths, goal in (("one scale", [one] * 8, 0.97), ("unequal", unequal, 0.95)):
        # A batch is not trimmed: three that all go on.
        models = {STOCK: setup.stock, OURS: setup.scaled(), AGAIN: setup.stock}
        batches = {kind: Batch(setup, model, lengths) for kind, model in models.items()}
        seconds = setup.interleave(lambda kind: batches[kind].decode(setup.tokens))  # noqa: B023
        yield Comparison(f"batch of 8, {name}", max(lengths), seconds, goal=goal)


def release(setup: Setup) -> Iterator[Comparison]:
    """Decode with keys that are rotated once, and (as stock) with all rotated at every token."""
    for length in setup.lengths:
        theirs = Bench(setup, *rotating_again(setup.another()), length)
        ours = Bench(setup, setup.scaled(), None, length)
        benches = {STOCK: theirs, OURS: ours, AGAIN: theirs}
        seconds = setup.interleave(lambda kind: benches[kind].decode(length, setup.tokens))  # noqa: B023
        yield Comparison("keys rotated once", length, seconds, goal=0.99)


def step(setup: Setup) -> Iterator[Comparison]:
    """Decode across a step of the scale, which rotates the cached keys."""
    start = 2 * setup.trained_length - setup.tokens // 2
    benches = _benches(setup, setup.scaled(), start, planned=False)
    seconds = setup.interleave(
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
        seconds = setup.interleave(lambda kind: benches[kind].read(start, length))  # noqa: B023
        yield Comparison("prefill", length, seconds, goal=0.99)


def method(setup: Setup, name: str) -> Iterator[Comparison]:
    """Decode with one method after a text of the greatest length."""
    length = setup.lengths[-1]
    benches = _benches(setup, setup.scaled(name), length)
    seconds = setup.interleave(lambda kind: benches[kind].decode(length, setup.tokens))
    yield Comparison(f"method-{name}", length, seconds, goal=0.99)


CASES: dict[str, Callable[[Setup], Iterator[Comparison]]] = {
    "decode": decode,
    "decode-kv8": partial(decode, kv_bits=8),
    "decode-4bit": partial(decode, bits=4),
    "step": step,
    "prefill": prefill,
    "batch": batch,
    "release": release,
    **{f"method-{name}": partial(method, name=name) for name in SCALINGS},
}
