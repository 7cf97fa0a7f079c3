"""Names of the ways to draw scales and positions in training, and the choice of a method.

The two choices are independent. Skips follow PoSE (arXiv 2309.10400), cream CREAM (arXiv
2406.07138). With either, some steps may be plain: rows are cut to at most L0 tokens and get the
scale of texts of that length.

Not covered: the drawing (`training/draws.py`).
"""

from dataclasses import dataclass

from ..errors import InputError

UNIFORM, GENE, FIXED = "uniform", "gene", "fixed"
SCALE_DRAWS = {
    UNIFORM: "a whole number up to the largest scale, all equally likely, as in CLEX",
    GENE: "a multiple of length / trained length, smallest and largest most often, as in GeNE",
    FIXED: "always the scale of the sequence's length",
}
RELEASE, SKIPS, CREAM = "release", "skips", "cream"
CONTIGUOUS, PIECES = "contiguous", "pieces"
SKIPPING = (SKIPS, CREAM)  # rows with jumps, up to the scaled length
SAMPLINGS = {
    RELEASE: "a sorted sample over the scaled length, neighbours far apart, as in the CLEX release",
    SKIPS: "one to four runs of neighbours with jumps between them, up to the scaled length",
    CREAM: "a head at 0, a tail at the end of the scaled length, and the rest together between "
    "them, after CREAM",
    CONTIGUOUS: "0, 1, 2, ..., as in GeNE",
    PIECES: "0, 1, 2, ... in 1, 2, 4, ... equal pieces of the row, a drawn number; each is at the "
    "scale of its length, four trained lengths or more where the row has them",
}
PLAIN_SHARE = 0.25  # share of plain steps with the best result for CLEX


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """How training draws scales and positions."""

    scale_draw: str = FIXED  # one of SCALE_DRAWS
    sampling: str = CONTIGUOUS  # one of SAMPLINGS
    plain_share: float = 0.0  # share of plain steps, with jumps and sequences longer than L0

    def __post_init__(self) -> None:
        if self.scale_draw not in SCALE_DRAWS:
            raise InputError(
                f"--scale-draw must be one of {', '.join(SCALE_DRAWS)}, got {self.scale_draw!r}."
            )
        if self.sampling not in SAMPLINGS:
            raise InputError(
                f"--sampling must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}."
            )
        if self.sampling == PIECES and self.scale_draw != FIXED:
            raise InputError(
                f"--sampling {PIECES} has the scale of each piece's length. Use --scale-draw "
                f"{FIXED}, got {self.scale_draw}."
            )
        if not 0 <= self.plain_share < 1:
            raise InputError(f"--plain-share must be within 0..1, got {self.plain_share!r}.")

    def plain_share_at(self, length: int, trained: int) -> float:
        """Return the share of plain steps for sequences of this length, lengths in tokens.

        Jumps in sequences longer than L0 never have a scale below length / L0; plain steps
        train those scales.
        """
        return self.plain_share if self.sampling in SKIPPING and length > trained else 0.0
