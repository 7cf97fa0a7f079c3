"""Blocks of quantised .gguf weights, decoded with numpy.

Not covered: the IQ types and three-bit blocks, which the reader refuses by name.

Source: ggml-org/llama.cpp, ggml/src/ggml-quants.c, `dequantize_row_*`, and the block
    layouts in ggml-common.h.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """How one ggml type stores a run of elements."""

    name: str
    elements: int  # in a block
    nbytes: int  # of a block
    dtype: np.dtype  # decoded; uint16 holds the bits of bfloat16
    decode: Callable[[np.ndarray], np.ndarray] | None = None  # (blocks, nbytes) -> float32


def decode(raw: np.ndarray, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    """Turn the stored bytes of a tensor into numbers.

    Args:
        raw: uint8, all blocks of the tensor.
        kind: ggml type, a key of `BLOCKS`.
        shape: of the tensor, rows first.

    Returns:
        An array of `shape` and of the block's dtype.
    """
    block = BLOCKS[kind]
    if block.decode is None:
        return raw.view(block.dtype).reshape(shape)
    out = np.empty((raw.size // block.nbytes, block.elements), block.dtype)
    blocks = raw.reshape(-1, block.nbytes)
    step = max(1, _CHUNK // block.elements)
    for start in range(0, len(blocks), step):
        out[start : start + step] = block.decode(blocks[start : start + step])
    return out.reshape(shape)


_CHUNK = 1 << 22  # elements decoded at once: float32 work arrays of 16 MB


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """A float16 stored at `start`, (blocks, 1) float32."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low halves of all bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    bits = packed.copy().view(np.uint32)
    return ((bits >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    levels = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (levels.astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    levels = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * levels + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and minima of a K block, from twelve bytes."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _by_sub_block(blocks: np.ndarray, levels: np.ndarray) -> np.ndarray:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    scales, minima = scales * _half(blocks, 0), minima * _half(blocks, 2)
    levels = levels.reshape(-1, 8, 32).astype(np.float32)
    return (levels * scales[..., None] - minima[..., None]).reshape(-1, 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    return _by_sub_block(blocks, np.concatenate([packed & 15, packed >> 4], axis=2))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    packed = blocks[:, 48:].reshape(-1, 4, 1, 32)
    low = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    return _by_sub_block(blocks, low | high << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = (pairs >> np.array([[0], [2], [4], [6]], np.uint8) & 3).reshape(-1, 8, 32)
    levels = (low | high << 4).astype(np.float32) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return (levels.reshape(-1, 16, 16) * scales[..., None]).reshape(-1, 256)


_HALF = np.dtype(np.float16)
BLOCKS = {
    0: Block("F32", 1, 4, np.dtype(np.float32)),
    1: Block("F16", 1, 2, _HALF),
    30: Block("BF16", 1, 2, np.dtype(np.uint16)),
    2: Block("Q4_0", 32, 18, _HALF, _q4_0),
    3: Block("Q4_1", 32, 20, _HALF, _q4_1),
    6: Block("Q5_0", 32, 22, _HALF, _q5_0),
    7: Block("Q5_1", 32, 24, _HALF, _q5_1),
    8: Block("Q8_0", 32, 34, _HALF, _q8_0),
    12: Block("Q4_K", 256, 144, _HALF, _q4_k),
    13: Block("Q5_K", 256, 176, _HALF, _q5_k),
    14: Block("Q6_K", 256, 210, _HALF, _q6_k),
}
