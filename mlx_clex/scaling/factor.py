"""The common part of methods whose reach is a factor times the trained length."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from .base import Scaling
from .config import option


@dataclass(frozen=True, kw_only=True)
class FactorConfig:
    """The factor of the method."""

    factor: float = option(4.0, "Longest length / trained length.")

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise InputError(f"rope_scaling.factor must be >= 1, got {self.factor}.")


class FactorReach(Scaling):
    """A scaling that reaches `factor` times the trained length."""

    Config: ClassVar[type] = FactorConfig

    @classmethod
    def options_for(cls, factor: float) -> dict[str, float]:
        """Return `factor` unchanged."""
        return {"factor": factor}

    @property
    def reach(self) -> int | None:
        """L0 * factor. Longer sequences run, but answers get worse."""
        return int(self.trained_length * self.config.factor)

    @property
    def reach_reason(self) -> str:
        """Where `reach` comes from, for messages."""
        return f"trained length {self.trained_length} x factor {self.config.factor:g}"

    @property
    def largest_scale(self) -> float:
        """The factor."""
        return self.config.factor


class FactorScaling(FactorReach):
    """A scaling whose scale is its configured factor, whatever the length."""

    static: ClassVar[bool] = True

    def scale_at(self, length: int) -> float:
        """The factor."""
        return self.config.factor
