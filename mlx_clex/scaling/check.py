"""Check the frequencies of a scaling before they are used."""

import math
from collections.abc import Iterator

import numpy as np

from .base import Scaling


def check_frequencies(
    scaling: Scaling, scale: float | None = None, *, strict: bool = False
) -> str | None:
    """Check the frequencies of every layer at every scale that the model can have.

    Frequencies that are not learned are checked at the first scale only.

    Args:
        scaling: the scaling with its weights.
        scale: the fixed scale; None: the scale follows the text.
        strict: also report pairs faster than the pair before, which useful trained curves may
            have.

    Returns:
        A warning if learned frequencies are finite, but faster than pi radians per token, which
        alias, or too slow for float32; else None.

    Raises:
        InputError: they are not finite; the message has the method, scale and pair.
    """
    scaling.check_weights()
    first = scaling.scale_at(1) if scale is None else scale
    last = scaling.largest_scale if scaling.learned and scale is None else first
    found: dict[str, str] = {}
    scales = [first, *np.arange(first + 1, last + 0.5).tolist()]
    for layer in range((scaling.shape.layers or 1) if scaling.by_layer else 1):
        inv_freq = np.stack([scaling.finite_inv_freq(scale, layer) for scale in scales])
        for kind, at, text in _suspicious(inv_freq, strict) if scaling.learned else ():
            found.setdefault(kind, f"{text} at scale {scales[at]:g}")
    if not found:
        return None
    return (
        f"The learned frequencies of {scaling.name} are suspicious: {'; '.join(found.values())}. "
        "Longer texts may be answered wrongly: measure with mlx_clex perplexity."
    )


def _suspicious(inv_freq: np.ndarray, strict: bool) -> Iterator[tuple[str, int, str]]:
    """Yield each kind of suspicious frequency, and the index of the scale and text of its first.

    Args:
        inv_freq: radians per token, (scales, D/2) or (scales, H, D/2).
        strict: as in `check_frequencies`.
    """
    size = np.abs(inv_freq)
    for where in np.argwhere(size > math.pi)[:1]:
        speed = size[tuple(where)]
        text = f"pair {where[-1]} turns {speed:.3g} radians per token (above pi it aliases)"
        yield "fast", where[0], text
    for where in np.argwhere(size < np.finfo(np.float32).tiny)[:1]:
        yield "lost", where[0], f"pair {where[-1]} is too slow for float32 and does not turn"
    for where in np.argwhere(np.diff(inv_freq) > 0)[: int(strict)]:
        yield "order", where[0], f"pair {where[-1] + 1} is faster than pair {where[-1]}"
