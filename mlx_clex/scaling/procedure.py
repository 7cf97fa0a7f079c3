"""How scales and positions are drawn for training: the names, and the choice of a method.

The two choices are independent. Skips are after PoSE (arXiv 2309.10400). Some of their steps
may be plain: the rows are cut to at most L0 tokens, at the scale of texts of that length.

Not covered: the drawing itself (`training/draws.py`).
"""

from dataclasses import dataclass

from ..errors import InputError

UNIFORM, GENE, FIXED = "uniform", "gene", "fixed"
SCALE_DRAWS = {
    UNIFORM: "a whole number up to the largest scale, all equally likely, as CLEX",
    GENE: "a multiple of length / trained length, the smallest and largest most often, as GeNE",
    FIXED: "always the scale of the sequence's length",
}
RELEASE, SKIPS, CONTIGUOUS = "release", "skips", "contiguous"
SAMPLINGS = {
    RELEASE: "a sorted sample over the scaled length, neighbours far apart, as CLEX was published",
    SKIPS: "one to four runs of neighbours with jumps between them, up to the scaled length",
    CONTIGUOUS: "0, 1, 2, ..., as GeNE",
}
PLAIN_SHARE = 0.25  # share of plain steps that measured best for CLEX


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """How scales and positions are drawn."""

    scale_draw: str = FIXED  # one of SCALE_DRAWS
    sampling: str = CONTIGUOUS  # one of SAMPLINGS
    plain_share: float = 0.0  # share of plain steps among those of skips longer than L0

    def __post_init__(self) -> None:
        if self.scale_draw not in SCALE_DRAWS:
            raise InputError(
                f"--scale-draw must be one of {', '.join(SCALE_DRAWS)}, got {self.scale_draw!r}."
            )
        if self.sampling not in SAMPLINGS:
            raise InputError(
                f"--sampling must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}."
            )
        if not 0 <= self.plain_share < 1:
            raise InputError(f"--plain-share must be within 0..1, got {self.plain_share!r}.")

    def plain_share_at(self, length: int, trained: int) -> float:
        """Share of plain steps for sequences of this length, both lengths in tokens.

        Skips in sequences longer than L0 never draw a scale below length / L0; plain steps
        train those scales.
        """
        return self.plain_share if self.sampling == SKIPS and length > trained else 0.0
