"""How scales and positions are drawn for training: the names, and the choice of a method.

Scales: `uniform` over whole numbers, as CLEX; `gene`, as GeNE; `fixed`, the scale of the
training length. Positions:

    release     CLEX's: a sorted sample over the stretched length, neighbours far apart
    dense       a sorted sample of whole positions over L0 * scale; a share of the steps
                is plain: in rows of at most L0 tokens, at the scale of such texts
    skips       one to four runs of neighbours with jumps between them, up to L0 * scale
                (after PoSE, arXiv 2309.10400); a share may be plain, as under dense
    contiguous  0, 1, 2, ..., as GeNE

Not covered: the drawing itself (`training/draws.py`).
"""

from dataclasses import dataclass

from ..errors import InputError

SCALE_DRAWS = UNIFORM, GENE, FIXED = "uniform", "gene", "fixed"
SAMPLINGS = RELEASE, DENSE, SKIPS, CONTIGUOUS = "release", "dense", "skips", "contiguous"
PLAIN_SHARE = 0.25  # where a method does not say


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """How scales and positions are drawn."""

    scale_draw: str = FIXED  # one of SCALE_DRAWS
    sampling: str = CONTIGUOUS  # one of SAMPLINGS
    plain_share: float | None = None  # of the steps, at scale 1; None: of dense 0.25, else 0

    def __post_init__(self) -> None:
        if self.scale_draw not in SCALE_DRAWS:
            raise InputError(
                f"--scale-draw must be one of {', '.join(SCALE_DRAWS)}, got {self.scale_draw!r}."
            )
        if self.sampling not in SAMPLINGS:
            raise InputError(
                f"--sampling must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}."
            )
        share = self.plain_share
        if share is not None and not (isinstance(share, int | float) and 0 <= share < 1):
            raise InputError(f"--plain-share must be within 0..1, got {share!r}.")

    def plain_share_at(self, length: int, trained: int) -> float:
        """Return the share of plain steps for sequences of `length` tokens.

        Skips have no sequences longer than L0 at scales below their own length's, which a
        plain share gives back.
        """
        if self.sampling == DENSE:
            return PLAIN_SHARE if self.plain_share is None else self.plain_share
        if self.sampling == SKIPS and length > trained:
            return self.plain_share or 0.0
        return 0.0
