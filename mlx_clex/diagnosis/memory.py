"""Estimate the peak memory of reading, decoding and training, from the sizes of a model.

The peak is a sum of what is kept (weights, cached keys and values, what the backward pass needs)
and what is there for a moment (attention scores, activations, logits). The factors of the
activations are fitted to `mx.get_peak_memory()` on a CPU, over 90 tiny LLaMAs for reading and 50
for training. The peaks agree within 10 % in reading, and within 19 %, 5 % on average, in training.
The factors are more than one layer's, because MLX runs up to a hundred operations ahead of those
that are done.

Metal and CUDA are not measured. Their terms follow MLX's source: which attention is fused
(`use_fallback` in backend/*/scaled_dot_product_attention.cpp), everything else as on a CPU.

Not covered: memory that MLX keeps for reuse, and memory of Python and its packages.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START

from ..model import parts as passes
from ..model.chunked_loss import chunk_length
from .machine import Machine
from .sizes import GROUP, Sizes

STEP = 2048  # tokens of a prompt read in one pass, mlx-lm's default
_BLOCK = 256  # tokens by which mlx-lm's caches grow
REFUSED = 1.3  # a run of more than this times the memory is refused
_METAL_HEADS = (64, 72, 80, 96, 128)  # widths of a head with a fused kernel for long prompts
_CUDA_HEAD = 128  # widest head of cuDNN's attention
_MASK = 1  # bytes of a mask for each score of one head, where attention is not fused

# Numbers for each token that is read together, times the width.
_READ = {"hidden": 7.0, "queries": 6.0, "inner": 2.0}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Texts that are read and continued."""

    length: int  # tokens
    batch: int = 1
    step: int = STEP
    kv_bits: int | None = None
    kv_group: int = GROUP  # cached values that share a quantisation scale
    kv_start: int = DEFAULT_QUANTIZED_KV_START  # tokens from which the cache is quantised

    @property
    def plain(self) -> int:
        """The greatest length at which the cache is not quantised, tokens.

        The cache is quantised after the first pass that ends at `kv_start` or later.
        """
        if self.kv_bits is None:
            return self.length
        count = max(1, math.ceil(self.kv_start / self.step))
        return min(self.length, count * self.step)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training step."""

    length: int  # tokens of a sequence
    batch: int = 1
    rank: int = 8
    grad_checkpoint: bool = False
    full: bool = False  # all weights of the layers, not adapters
    states: int = 2  # numbers that the optimizer keeps for each weight it trains
    num_layers: int = -1  # the last layers, which are trained; -1: all
    learns: bool = False  # the scaling's tensors are trained, where they are not by default


# In training: numbers for each token, times the width; copies of the scores of one layer.
_KEPT = {"hidden": 5.8, "queries": 3.6, "inner": 4.7}  # of each layer
_KEPT_SCORES = 1.3
_BACKWARD = {"inner": 9.5}  # of the layer whose backward pass runs
_KEPT_CHECKPOINTED = {"hidden": 1.5}
_BACKWARD_CHECKPOINTED = {"queries": 1.2, "inner": 13.6}
_BACKWARD_LEARNING = {"queries": 3.8, "keys": 3.8}  # where the scaling learns, too
_BACKWARD_SCORES = 2.5
_LOGITS = 4.3  # copies during the loss
_CHUNKS = 3  # of logits that exist at once
_TRAINED = 4.0  # copies of adapters under Adam: weights, gradients, its numbers, new ones

Parts = dict[str, float]  # name -> bytes; the peak is their sum


def reading(sizes: Sizes, run: Reading, back_end: str) -> Parts:
    """Return the parts of the peak while a prompt is read."""
    item = sizes.itemsize

    def at(run: Reading, tokens: int, length: int) -> Parts:
        scores = 0.0
        if not fused(sizes, tokens, back_end):
            scores = tokens * length * (run.batch * sizes.heads * item + _MASK)
        return {
            "weights": sizes.weights,
            "KV cache": _cache(sizes, run, length),
            "copy of a layer's cache": run.batch * sizes.caches.largest * _grown(length) * item,
            "attention scores": scores,
            "activations": run.batch * tokens * item * _width(sizes, _READ),
        }

    plain = replace(run, length=run.plain)  # can need more than all of a quantised text
    runs = {plain, run}
    return max((at(one, *part) for one in runs for part in _slices(sizes, one)), key=peak)


def _slices(sizes: Sizes, run: Reading) -> Iterator[tuple[int, int]]:
    """Yield (tokens read at once, length after them) where the scores are largest.

    A long pass is read in parts (`model/parts.py`): the last of each number of parts.
    """
    step, heads = min(run.step, run.length), run.batch * sizes.heads
    last = passes.part_length(step, run.length - step, heads) if sizes.scaled else step
    yield last, run.length
    for count in range(1, math.ceil(step / last)):
        tokens = math.ceil(step / count)
        yield tokens, min(run.length, passes.MOST_SCORES // (heads * tokens))


def decoding(sizes: Sizes, run: Reading, back_end: str) -> Parts:
    """Return the parts of the peak while tokens are generated."""
    item = sizes.itemsize
    scores = 0.0
    if run.length > run.plain or not fused(sizes, 1, back_end):
        scores = run.batch * run.length * sizes.heads * item
    # Logits, their logarithms, and what the sampler makes of them, in float32.
    logits = 4 * 4 * run.batch * sizes.vocabulary
    return {
        "weights": sizes.weights,
        "KV cache": _cache(sizes, run, run.length),
        "copy of a layer's cache": _cache(sizes, run, run.length) / max(1, sizes.layers),
        "attention scores": scores,
        "activations": logits + run.batch * item * _width(sizes, _READ),
    }


def training(sizes: Sizes, run: Training, back_end: str) -> Parts:
    """Return the parts of the peak of a training step.

    Layers below those that are trained need a backward pass only where the scaling learns.
    """
    item = sizes.itemsize
    tokens = run.batch * run.length
    plain = not fused(sizes, run.length, back_end, training=True)
    scores = item * run.batch * sizes.heads * run.length**2 if plain else 0.0

    def values(factors: dict[str, float]) -> float:
        return tokens * item * _width(sizes, factors)

    learns = run.learns or sizes.learns_scaling
    layers = sizes.layers if learns else _trained_layers(sizes, run)

    # The head computes its logits in float32, one chunk of tokens after the other.
    together = min(tokens, _CHUNKS * chunk_length(sizes.vocabulary))
    logits = 4.0 * together * sizes.vocabulary
    if run.grad_checkpoint:
        kept, kept_scores = values(_KEPT_CHECKPOINTED), 0.0
        backward, backward_scores = values(_BACKWARD_CHECKPOINTED), _BACKWARD_SCORES * scores
        backward += values(_BACKWARD_LEARNING) if learns else 0.0
    else:
        kept, kept_scores = values(_KEPT), layers * _KEPT_SCORES * scores
        backward, backward_scores = values(_BACKWARD), 0.0
    # The loss comes first, then the backward pass of one layer after the other.
    loss = _LOGITS * logits
    if loss > backward + backward_scores:
        backward, backward_scores = 0.0, 0.0
    else:
        loss = 0.0
    return {
        "weights": sizes.weights,
        "trained weights": _trained(sizes, run),
        "kept for the backward pass": layers * kept,
        "attention scores": kept_scores + backward_scores,
        "activations": backward,
        "logits": loss,
    }


def _trained(sizes: Sizes, run: Training) -> float:
    """Return the bytes of trained weights, gradients and the optimizer's numbers, in float32.

    Weights that are trained whole are counted as weights, adapters here.
    """
    share = _trained_layers(sizes, run) / max(1, sizes.layers)
    if run.full:
        return 4.0 * share * sizes.parameters * (run.states + 1)
    adapters = share * run.rank * sum(inputs + outputs for inputs, outputs in sizes.linear)
    return 4.0 * adapters * (_TRAINED if run.states == 2 else run.states + 2)


def _trained_layers(sizes: Sizes, run: Training) -> int:
    return sizes.layers if run.num_layers < 0 else min(run.num_layers, sizes.layers)


def fused(sizes: Sizes, tokens: int, back_end: str, *, training: bool = False) -> bool:
    """Return whether attention is computed without its scores in memory.

    Args:
        sizes: the model's.
        tokens: queries in one pass.
        back_end: "cpu", "metal" or "cuda".
        training: with a gradient.
    """
    if back_end == "metal":
        # With a gradient, 0.32.4 computes causal attention in blocks.
        return training or tokens <= 8 or sizes.head_dim in _METAL_HEADS
    if back_end == "cuda":
        whole = sizes.head_dim % 8 == 0 and sizes.head_dim <= _CUDA_HEAD
        return tokens == 1 or (whole and sizes.itemsize == 2)
    return False


def longest(parts: Callable[[int], Parts], memory: float, limit: int = 1 << 24) -> int:
    """Return the greatest length, in tokens, whose peak is within `memory`; 0: none.

    Args:
        parts: the parts of the peak at a length.
        memory: bytes.
        limit: the greatest length to look at.
    """
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(parts(middle)) <= memory else (low, middle)
    return low


def peak(parts: Parts) -> float:
    """Return the sum of the parts, in bytes."""
    return sum(parts.values())


def verdict(needed: float, machine: Machine) -> str:
    """Return "fits", "tight" (more than MLX should use) or "too large" (refused)."""
    if needed <= machine.usable:
        return "fits"
    return "tight" if needed <= REFUSED * machine.memory else "too large"


def _width(sizes: Sizes, factors: dict[str, float]) -> float:
    """Return numbers for each token: factors times the widths of the model that they name."""
    return sum(factor * getattr(sizes, name) for name, factor in factors.items())


def _grown(length: int) -> int:
    return math.ceil(length / _BLOCK) * _BLOCK


def _cache(sizes: Sizes, run: Reading, length: int) -> float:
    bits = run.kv_bits if run.length > run.plain else None
    return run.batch * sizes.caches.nbytes(_grown(length), sizes.itemsize, bits, run.kv_group)
