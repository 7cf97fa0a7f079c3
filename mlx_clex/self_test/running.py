"""Check how models run: quantised, in batches, in a thread, out of memory, on real text."""

import importlib.resources
import json
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.generate import generate_step, maybe_quantize_kv_cache

from ..bundled import MODELS
from ..evaluation.corpus import corpus_of
from ..evaluation.perplexity import score
from ..loading import load
from ..model.scaled_model import attach, make_prompt_cache
from ..scaling import SCALINGS
from . import golden
from .measurement import Measurement, ids, largest, on_metal, peak_of, random_llama

PERPLEXITIES = "perplexity.json"
LENGTHS = (64, 256, 1024)  # tokens; the bundled models are trained on 64
_WINDOWS = 4
_BLOCKS, _TOKENS = 7, 8  # of `decode_ratios`


def quantised_weights() -> Iterator[Measurement]:
    """Compare 4-bit weights with the same weights restored; relative to the largest logit."""
    model = random_llama()
    nn.quantize(model, group_size=64, bits=4)
    plain = random_llama()
    restored = [
        (f"{name}.weight", mx.dequantize(m.weight, m.scales, m.biases, group_size=64, bits=4))
        for name, m in model.named_modules()
        if isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding)
    ]
    plain.update(tree_unflatten(restored))
    for length, what in ((1, "one token"), (64, "many tokens")):
        ours, theirs = (m(ids(1, length)) for m in (model, plain))
        error = largest(ours - theirs) / largest(theirs)
        yield Measurement(f"4-bit weights, {what}", error, 1e-4)


def quantised_cache() -> Iterator[Measurement]:
    """Measure how far a quantised cache moves the logits, and its memory while it reads."""
    model = attach(random_llama(), {"type": "clex"})
    text = ids(1, 513)
    logits, peaks = {}, {}
    for bits in (None, 8, 4):

        def read(bits: int | None = bits) -> mx.array:
            cache = make_prompt_cache(model, 513)
            model(text[:, :256], cache=cache)
            maybe_quantize_kv_cache(cache, 0, 64, bits)
            model(text[:, 256:512], cache=cache)
            logits[bits] = model(text[:, 512:], cache=cache)
            return logits[bits]

        peaks[bits] = peak_of(read)
    for bits, bound in ((8, 2e-2), (4, 3e-1)):
        error = largest(logits[bits] - logits[None]) / largest(logits[None])
        yield Measurement(f"{bits}-bit KV cache", error, bound)
    for bits, peak in peaks.items():
        what = f"with {bits}-bit KV" if bits else "with float KV"
        yield Measurement(f"peak {what}, MB", peak / 1e6)


def unequal_scales() -> Iterator[Measurement]:
    """Compare a batch whose rows have scales of their own with each row alone."""
    # At a factor of 2 the rows' scales differ.
    entries = ({"type": "clex"}, {"type": "gene", "factor": 2}, {"type": "gene-param", "factor": 2})
    for entry in entries:
        model = attach(random_llama(), entry)
        text = ids(2, 300)
        lengths = (40, 200)

        def read(row: int, length: int, model: Any = model, text: mx.array = text) -> Any:
            cache = make_prompt_cache(model)
            mx.eval(model(text[row : row + 1, :length], cache=cache))
            return cache

        caches = [read(row, length) for row, length in enumerate(lengths)]
        merged = [type(rows[0]).merge(rows) for rows in zip(*caches, strict=True)]
        errors = []
        for step in range(3):
            new = mx.stack([text[row, n + step] for row, n in enumerate(lengths)])[:, None]
            batch = model(new, cache=merged)
            alone = [model(new[row : row + 1], cache=caches[row]) for row in (0, 1)]
            errors.append(largest(batch - mx.concatenate(alone)) / largest(batch))
        yield Measurement(f"batch at two scales, {entry['type']}", max(errors), 1e-3)


def worker_thread() -> Iterator[Measurement]:
    """Count tokens that differ when a model answers in another thread, as the server does."""
    model, tokenizer = load(MODELS["clex"])
    prompt = mx.array(tokenizer.encode("And it came to pass", add_special_tokens=False))
    answers: list[list[int]] = []

    def answer() -> None:
        cache = make_prompt_cache(model)
        steps = generate_step(prompt, model, max_tokens=100, prompt_cache=cache)
        answers.append([int(token) for token, _ in steps])

    answer()
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    here, there = answers
    different = sum(a != b for a, b in zip(here, there, strict=True))
    yield Measurement("tokens that differ in a thread", different, 0)


def too_large() -> Iterator[Measurement]:
    """Ask for an array that no device has memory for, and then run a normal pass.

    On a CPU, MLX 0.32.4 ends the process, so this is checked on Metal alone.
    """
    if not on_metal():
        return
    largest_buffer = int(mx.device_info()["max_buffer_length"])
    allowed = 0
    try:
        mx.eval(mx.ones((largest_buffer // 2**20 + 1, 2**20), mx.int8))
        allowed = 1
    except RuntimeError:
        pass
    yield Measurement("arrays that are too large, but allowed", allowed, 0)
    for found in golden.prefill():
        yield replace(found, name=f"{found.name} after it")


def pinned_perplexities() -> dict[str, dict[str, float]]:
    """Measure the perplexities of bundled models, by name and length."""
    found: dict[str, dict[str, float]] = {}
    for name in ("clex", "gene"):
        model, tokenizer = load(MODELS[name])
        model.set_dtype(mx.float32)
        corpus = corpus_of(None, "test", tokenizer)
        found[name] = {
            str(length): score(model, corpus, length, _WINDOWS).perplexity for length in LENGTHS
        }
    return found


def perplexity() -> Iterator[Measurement]:
    """Compare the perplexities of the bundled models with those of another machine."""
    file = importlib.resources.files("mlx_clex") / "golden" / PERPLEXITIES
    expected = json.loads(file.read_text())
    for name, by_length in pinned_perplexities().items():
        for length, value in by_length.items():
            error = abs(value / expected[name][length] - 1)
            yield Measurement(f"perplexity of {name} at {length}", error, 1e-3)


def decode_ratios() -> Iterator[Measurement]:
    """Measure the speed of decoding with each method / without one; information."""
    prompt = ids(1, 300)

    def started(model: Any) -> tuple[Any, Any]:
        cache = make_prompt_cache(model)
        mx.eval(model(prompt, cache=cache))
        return model, cache

    def seconds(model: Any, cache: Any) -> float:
        start = time.perf_counter()
        for _ in range(_TOKENS):
            mx.eval(model(prompt[:, :1], cache=cache))
        return time.perf_counter() - start

    length = {"max_position_embeddings": 512}
    stock = random_llama(**length)
    for method, scaling in SCALINGS.items():
        entry = {"type": method, **scaling.options_for(16)}
        plain, ours = started(stock), started(attach(random_llama(**length), entry))
        pairs = [(seconds(*plain), seconds(*ours)) for _ in range(_BLOCKS)]
        ratio = statistics.median(theirs / mine for theirs, mine in pairs)
        yield Measurement(f"decode ratio, {method}", ratio)
