"""Compare the speed of a model with CLEX attached and without it.

    python -m benchmarks.decode --model build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf [--quick]

For each context length the benchmark times blocks of decoding and blocks of prefill (the last
tokens of the context). The stock model, the model with CLEX and the stock model again take
turns, so that other load on the machine affects all three. The ratio of speeds compares
neighbouring blocks; the table has its median and a 95 % bootstrap interval. The ratio of
stock to stock shows the noise. A last run decodes across a step of the scale.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx_clex  # isort: skip  (before mlx.core: on Linux it looks for OpenBLAS)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import trim_prompt_cache

TRAINED_LENGTH = 1024  # tokens: L0 of the attached scaling
CHUNK = 512  # tokens in one pass of prefill
KINDS = ("stock", "clex", "stock again")


@dataclass
class Bench:
    """A model and its cache."""

    model: nn.Module
    cache: list[Any]
    tokens: mx.array  # the context and one more token, (L,)

    @property
    def length(self) -> int:
        """Return the number of tokens in the cache."""
        return int(self.cache[0].offset)

    def read(self, start: int, stop: int) -> None:
        """Trim the cache to `start` tokens and read tokens[start:stop] in chunks."""
        trim_prompt_cache(self.cache, self.length - start)
        for at in range(start, stop, CHUNK):
            self.model(self.tokens[None, at : min(at + CHUNK, stop)], cache=self.cache)
            mx.eval([cache.state for cache in self.cache])

    def decode(self, start: int, count: int) -> None:
        """Trim the cache to `start` tokens and decode `count` tokens with mlx-lm's loop."""
        trim_prompt_cache(self.cache, self.length - start)
        last = self.tokens[start : start + 1]
        for _ in generate_step(last, self.model, max_tokens=count, prompt_cache=self.cache):
            pass


def interleave(
    benches: dict[str, Bench],
    block: Callable[[Bench], None],
    blocks: int,
    prepare: Callable[[Bench], None] = lambda bench: None,
) -> dict[str, list[float]]:
    """Return the seconds of each block by kind; the order of kinds rotates each round."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(blocks + 1):
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            prepare(benches[kind])
            start = time.perf_counter()
            block(benches[kind])
            if number:  # the first round warms up
                seconds[kind].append(time.perf_counter() - start)
    return seconds


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median, from 10,000 resamplings."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


def report(what: str, tokens: int, seconds: dict[str, list[float]]) -> None:
    """Print a row of the table."""
    speed = {kind: tokens / statistics.median(seconds[kind]) for kind in KINDS}
    cells = [what, f"{speed['stock']:.1f}", f"{speed['clex']:.1f}"]
    ratios = {}
    for kind in KINDS[1:]:
        ratios[kind] = [s / t for s, t in zip(seconds["stock"], seconds[kind], strict=True)]
        low, high = interval(ratios[kind])
        cells.append(f"{statistics.median(ratios[kind]):.3f} ({low:.3f} to {high:.3f})")
    met = interval(ratios["clex"])[1] >= 0.99 and statistics.median(ratios["clex"]) >= 0.97
    print(f"| {' | '.join(cells)} | {'yes' if met else 'no'} |", flush=True)


def fill(model: nn.Module, tokens: mx.array, context: int, planned: bool) -> Bench:
    """Read `context` tokens into a new cache, at the scale of their length if `planned`."""
    cache = mlx_clex.make_prompt_cache(model, expected_length=context if planned else None)
    bench = Bench(model, cache, tokens)
    bench.read(0, context)
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="a folder, a .gguf file or a Hugging Face id"
    )
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[2000, 6000], help="context lengths, tokens"
    )
    parser.add_argument("--blocks", type=int, default=9, help="blocks of each kind")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a block")
    parser.add_argument(
        "--step-tokens",
        type=int,
        default=128,
        help="tokens decoded in a block across a step of the scale",
    )
    parser.add_argument("--quick", action="store_true", help="context 300 and 3 blocks")
    args = parser.parse_args()
    if args.quick:
        args.contexts, args.blocks, args.tokens, args.step_tokens = [300], 3, 8, 16

    stock, _ = mlx_clex.load(args.model)
    scaled, _ = mlx_clex.load(args.model)
    stock.set_dtype(mx.float32)
    scaled.update(stock.parameters())  # one set of weights in memory
    mlx_clex.attach(scaled, {"type": "clex"}, trained_length=TRAINED_LENGTH)
    vocabulary = stock.args.vocab_size
    longest = max([*args.contexts, 2 * TRAINED_LENGTH])
    tokens = mx.random.randint(0, vocabulary, (longest + 1,), key=mx.random.key(0))

    print("| | stock, tokens/s | CLEX | CLEX / stock | stock / stock | met |")
    print("|---|---|---|---|---|---|")
    for context in args.contexts:
        plain = fill(stock, tokens, context, planned=True)
        clex = fill(scaled, tokens, context, planned=True)
        benches = dict(zip(KINDS, (plain, clex, plain), strict=True))
        block = partial(Bench.decode, start=context, count=args.tokens)
        seconds = interleave(benches, block, args.blocks)
        report(f"decode at {context}", args.tokens, seconds)
        start = max(0, context - CHUNK)
        block = partial(Bench.read, start=start, stop=context)
        seconds = interleave(benches, block, args.blocks)
        report(f"read {start} to {context}", context - start, seconds)

    step = TRAINED_LENGTH if args.quick else 2 * TRAINED_LENGTH
    start = step - args.step_tokens // 2
    plain = fill(stock, tokens, start, planned=False)
    clex = fill(scaled, tokens, start, planned=False)
    benches = dict(zip(KINDS, (plain, clex, plain), strict=True))
    block = partial(Bench.decode, start=start, count=args.step_tokens)
    # Decoding one token before each block moves the keys back to the scale before the step.
    seconds = interleave(benches, block, args.blocks, partial(Bench.decode, start=start, count=1))
    report(f"decode {start} to {start + args.step_tokens}", args.step_tokens, seconds)


if __name__ == "__main__":
    main()
