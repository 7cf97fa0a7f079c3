"""Draw the scale and the positions of each training step.

`scaling/procedure.py` lists the ways to draw, and each scaling has its own procedure. Random
numbers are NumPy's, whose state can be saved and restored exactly.

Not covered: which tokens a step has.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..scaling import Scaling
from ..scaling.procedure import CONTIGUOUS, CREAM, FIXED, GENE, PIECES, RELEASE, UNIFORM, Procedure

_MOST_RUNS = 4  # of `skips`
_SHORT_END = 32  # tokens, of `cream`
_SHORTEST_PIECE = 4  # of `pieces`, in trained lengths


@dataclass(frozen=True)
class Draw:
    """The scale and positions of one forward pass."""

    scale: float  # target length / trained length
    positions: np.ndarray  # tokens, float32, (L / pieces,)
    pieces: int = 1  # how many sequences of equal length each row is cut into


class Draws:
    """Draws a scale and positions for each step, the same for all rows."""

    def __init__(self, scaling: Scaling, procedure: Procedure, rng: np.random.Generator) -> None:
        """Check that the scaling can be trained like this.

        Args:
            scaling: of the model.
            procedure: how to draw.
            rng: where random numbers come from; its state decides all that follows.

        Raises:
            InputError: the scaling has one scale for all lengths, and a draw is asked for.
        """
        if scaling.static and procedure.scale_draw != FIXED:
            raise InputError(
                f"--scale-draw {procedure.scale_draw} needs a scaling whose scale can change; "
                f"{scaling.name} has one for all lengths. Use --scale-draw fixed."
            )
        self.scaling = scaling
        self.procedure = procedure
        self.rng = rng

    @property
    def longest(self) -> int | None:
        """The longest sequence that can be drawn for, in tokens; None where there is no limit."""
        scaling = self.scaling
        limits = [scaling.reach] if scaling.hard_reach and scaling.reach is not None else []
        if self.procedure.scale_draw != FIXED:
            limits.append(scaling.trained_length * int(self.scaling.largest_scale))
        return min(limits, default=None)

    def check(self, length: int) -> None:
        """Refuse a training length that cannot be drawn for.

        Args:
            length: of the sequences, tokens.

        Raises:
            InputError: it is too short, or beyond `longest`.
        """
        if length < 4:
            raise InputError(f"--max-seq-length must be at least 4 tokens, got {length}.")
        trained, longest = self.scaling.trained_length, self.longest
        if longest is not None and length > longest:
            raise InputError(
                f"--max-seq-length {length} is beyond {longest} tokens (trained length {trained} "
                f"x {longest // trained}), the longest that this scaling can be trained at: lower "
                "it, or raise --max-factor or --factor."
            )

    def draw(self, length: int) -> Draw:
        """Draw the next scale and positions, for sequences of `length` tokens."""
        procedure, trained = self.procedure, self.scaling.trained_length
        plain_share = procedure.plain_share_at(length, trained)
        pieces = 0
        if plain_share and self.rng.random() < plain_share:
            pieces = _steps(length, trained)
        elif procedure.sampling == PIECES:
            doublings = max(0, (length // (_SHORTEST_PIECE * trained)).bit_length() - 1)
            pieces = 2 ** int(self.rng.integers(0, doublings + 1))
        if pieces:
            piece = length // pieces
            scale = self.scaling.scale_at(piece)  # 1 for a plain step of CLEX
            return Draw(scale, np.arange(piece, dtype=np.float32), pieces)
        scale = self._scale(length)
        if procedure.sampling == CONTIGUOUS:
            return Draw(scale, np.arange(length, dtype=np.float32))
        if procedure.sampling == RELEASE:
            span = int(length * scale) - 2
            sample = self.rng.choice(span, length - 2, replace=False, shuffle=False)
            return Draw(scale, release_positions(np.sort(sample), length, int(scale), trained))
        span = max(length, int(trained * scale))
        draw = self._cream if procedure.sampling == CREAM else self._skips
        return Draw(scale, draw(length, span).astype(np.float32))

    def _scale(self, length: int) -> float:
        trained = self.scaling.trained_length
        if self.procedure.scale_draw == UNIFORM:
            # Positions cannot lie as near as those of a text shorter than this one,
            # except under `release`, which divides them.
            released = self.procedure.sampling == RELEASE
            least = 1 if released else _steps(length, trained)
            return float(self.rng.integers(least, int(self.scaling.largest_scale) + 1))
        if self.procedure.scale_draw == GENE:
            chances = gene_chances(self.scaling.largest_scale, length, trained)
            return float((1 + self.rng.choice(len(chances), p=chances)) * _steps(length, trained))
        return self.scaling.scale_at(length)

    def _skips(self, length: int, span: int) -> np.ndarray:
        """Runs of neighbours, each further on than the one before, within the span."""
        runs = int(self.rng.integers(1, min(_MOST_RUNS, length) + 1))
        cuts = np.sort(1 + self.rng.choice(length - 1, runs - 1, replace=False, shuffle=False))
        offsets = np.sort(self.rng.integers(0, span - length + 1, runs))
        if self.rng.random() < 0.5:
            offsets = offsets - offsets[0]
        run = np.searchsorted(cuts, np.arange(length), side="right")
        return np.arange(length) + offsets[run]

    def _cream(self, length: int, span: int) -> np.ndarray:
        """A head from 0, a tail to the end of the span, and a middle between them.

        Head and tail have 32 tokens each or a third of the row, equally likely. Of the positions
        left out, a normal number is before the middle, on average half.

        Source: after CREAM (arXiv 2406.07138), which draws the middle in two steps.
        """
        end = length // 3
        if self.rng.random() < 0.5:
            end = min(end, _SHORT_END)
        positions, free = np.arange(length), span - length  # free: those that no token has
        before = -1.0 if free else 0.0
        while not 0 <= before <= free:
            before = self.rng.normal(free / 2, 0.1 * free + 1)
        positions[end:] += round(before)
        positions[length - end :] += free - round(before)
        return positions


def release_positions(sample: np.ndarray, length: int, scale: int, trained: int) -> np.ndarray:
    """CLEX's training positions for a sample.

    With s = length / L0 in whole steps: 0, each of the sample plus 1 and divided by s,
    then (length * scale) // s - 1, which may equal or be smaller than its neighbour.

    Args:
        sample: sorted, (length - 2,) whole numbers below length * scale - 2.
        length: of the sequences, tokens.
        scale: target length / trained length.
        trained: L0, tokens.

    Returns:
        Tokens, whole or not, float32, (length,).

    Source: CLEX (arXiv 2310.16450); the repository's CLEX/modeling_llama.py,
        `CLEXScalingRotaryEmbedding.sample_random_times` and `forward`.
    """
    s = max(1, length // trained)
    last = length * scale // s - 1
    return np.concatenate([[0], (sample + 1) / s, [last]]).astype(np.float32)


def gene_chances(factor: float, length: int, trained: int) -> np.ndarray:
    """GeNE's probabilities of the multiples 1..S of ceil(length / L0).

    S is factor // ceil(length / L0). Above 4, the smallest and the largest have a
    quarter each and the others share the rest.

    Source: GeNE (Findings of ACL 2024, 249); the repository's gene/gene_rope.py.
    """
    count = int(factor // _steps(length, trained))
    if count <= 4:
        return np.full(count, 1 / count)
    chances = np.full(count, 0.5 / (count - 2))
    chances[[0, -1]] = 0.25
    return chances


def _steps(length: int, trained: int) -> int:
    """ceil(length / L0)."""
    return -(-length // trained)
