"""CLEX: frequencies as an ODE over the scale.

With z = ln inv_freq and the scale t, a two-layer network drives

    dz/dt = act((z + ln n(t)) @ W_up) @ W_down + d ln n / dt,
    ln n_i(t) = -(i/D) ln 10000 - i/(D-2) ln(2t - 1),   i = 0, 2, ..., D-2.

Only the network's part y = (z - ln n) - (z - ln n)(1) is integrated. In u = ln(2t - 1), where the
right-hand side varies evenly,

    dy/du = e^u / 2 * act((y + z(1) + ln n(1) - 2i/(D-2) u) @ W_up) @ W_down,

and W_down = 0 gives exactly NTK-aware scaling by 2t - 1.

For inference one solve serves all scales 1..max_factor: float64 on the host, equal steps
in u, 8 from scale 1 to 2, 4 between neighbours below 4, 2 above. At max_factor 64 and
D 128 that is 136 steps. The number is doubled until the estimated error in ln inv_freq is
below 1e-7, which it is at once for weights as large as published ones. For training, steps
equal in sqrt(2t - 1), float32, lead straight to the one scale of the pass: 4 sqrt(max_factor)
of them, at least 16. Measured errors are in `docs/benchmarks.md`.

Not covered: drawing scales and positions for training.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from .base import Scaling
from .config import option
from .ode import Rhs, solve, solve_with_error
from .procedure import CREAM, PLAIN_SHARE, RELEASE, UNIFORM, Procedure

# Published weights were trained with this base in ln n(t), whatever the model's
# rope_theta is (Mixtral: 1e6).
NETWORK_BASE = 10_000.0

_FEWEST_TRAINING_STEPS = 16

_TOLERANCE = 1e-7  # of ln inv_freq at inference
_MOST_STEPS = 1 << 14  # of a solve, unless max_factor needs more from the start

_LARGEST_NETWORK = 64  # published networks have 1
_LARGEST_FACTOR = 4096  # every scale up to it is solved at load, so a mistyped factor is refused

# NumPy for the solve at load, MLX for training.
_ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tanh": (np.tanh, mx.tanh),
    # x * sigmoid(x), written so that a large -x does not overflow exp.
    "silu": (lambda x: x * (0.5 * (1 + np.tanh(x / 2))), nn.silu),
}


@dataclass(frozen=True, kw_only=True)
class ClexConfig:
    """The reach, the network, and the gain on queries."""

    max_factor: int = option(16, "Longest length / trained length; longer texts are refused.")
    param_factor: int = option(1, "Hidden size of the network / rotated dimensions.")
    act: str = option("tanh", "Activation of the network, tanh or silu.")
    factor: float = option(1.0, "")
    time_dt: float = option(0.01, "")  # step of the released solver; ours is finer
    log_scale: bool = option(False, "Raise attention with the logarithm of the length.")
    log_gain: bool = option(
        False, "Raise attention with the logarithm of the scale, in training too; new models only."
    )

    def __post_init__(self) -> None:
        if self.log_scale and self.log_gain:
            raise InputError(
                "rope_scaling.log_scale and log_gain exclude each other: set one to false."
            )
        if self.max_factor < 1:
            raise InputError(f"rope_scaling.max_factor must be at least 1, got {self.max_factor}.")
        if self.max_factor > _LARGEST_FACTOR:
            raise InputError(
                f"rope_scaling.max_factor must be at most {_LARGEST_FACTOR}, got {self.max_factor}."
            )
        if not 1 <= self.param_factor <= _LARGEST_NETWORK:
            raise InputError(
                f"rope_scaling.param_factor must be within 1..{_LARGEST_NETWORK}, got "
                f"{self.param_factor}."
            )
        if self.act not in _ACTIVATIONS:
            raise InputError(
                f"rope_scaling.act must be one of {', '.join(_ACTIVATIONS)}, got {self.act!r}."
            )
        if not self.time_dt > 0:
            raise InputError(f"rope_scaling.time_dt must be > 0, got {self.time_dt}.")


class Clex(Scaling):
    """Slows slow pairs most, along a learned curve.

    Fast pairs stay close to the trained ones. Needs fine-tuning, by default of the model's weights
    alone: with an untrained network the curve is NTK-aware scaling by 2t - 1. The scale follows
    the length in whole numbers; sequences longer than L0 * max_factor are refused.
    """

    name: ClassVar[str] = "clex"
    Config: ClassVar[type] = ClexConfig
    published: ClassVar[bool] = True
    hard_reach: ClassVar[bool] = True
    learned: ClassVar[tuple[str, ...]] = ("up_proj", "down_proj")
    untrained: ClassVar[str] = "NTK at 2t - 1"
    # Trained together with the weights, the network makes the end of the reach worse
    # (docs/benchmarks.md, "What was tried for CLEX").
    learning_rate_share: ClassVar[float] = 0.0
    released_procedure: ClassVar[Procedure] = Procedure(scale_draw=UNIFORM, sampling=RELEASE)

    def __init__(self, config: ClexConfig | None = None, **shape: Any) -> None:
        """See `Scaling`; the network starts with W_down = 0."""
        super().__init__(config, **shape)
        hidden = self.config.param_factor * self.dims
        bound = 1 / math.sqrt(hidden)
        # A fixed key, so that `attach` does not change the random numbers of a seeded program.
        key = mx.random.key(0)
        self.up_proj = mx.random.uniform(-bound, bound, (self.dims // 2, hidden), key=key)
        self.down_proj = mx.zeros((hidden, self.dims // 2))

    def scale_at(self, length: int) -> float:
        """Return ceil(length / L0), within 1..max_factor; `length` in tokens."""
        scale = -(-length // self.trained_length)
        return float(min(max(scale, 1), self.config.max_factor))

    @classmethod
    def options_for(cls, factor: float) -> dict[str, float]:
        """Return max_factor: `factor`, rounded up."""
        return {"max_factor": math.ceil(factor)}

    @property
    def reach(self) -> int | None:
        """L0 * max_factor. Longer sequences are refused."""
        return self.trained_length * self.config.max_factor

    @property
    def reach_reason(self) -> str:
        """Where `reach` comes from, for messages."""
        return f"trained length {self.trained_length} x max_factor {self.config.max_factor}"

    @property
    def largest_scale(self) -> float:
        """max_factor."""
        return float(self.config.max_factor)

    @property
    def procedure(self) -> Procedure:
        """After CREAM, which measured better than the paper's procedure (docs/benchmarks.md)."""
        return Procedure(scale_draw=UNIFORM, sampling=CREAM, plain_share=PLAIN_SHARE)

    @classmethod
    def from_release(cls, entry: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        """Return the entry with log_scale, act and time_dt filled in.

        Source: DAMO-NLP-SG/CLEX, configuration_clex.py `CLEXLlamaConfig` (log_scale is
            true unless given); its Mixtral and Phi code never reads the key. Configs of
            October 2023 have neither `act` nor `time_dt`.
        """
        family = config.get("model_type")
        log_scale = config.pop("log_scale", None)
        if family in ("mixtral", "phi"):
            log_scale = False
        elif log_scale is None:
            log_scale = family == "llama"
        return {"log_scale": log_scale, "act": "silu", "time_dt": 0.01, **entry}

    def check_scale(self, scale: float) -> float:
        """Return `scale`; refuse a number outside 1..max_factor."""
        if not (isinstance(scale, Real) and 1 <= scale <= self.config.max_factor):
            raise InputError(
                f"The scale of this CLEX model must be within 1..{self.config.max_factor} "
                f"(its max_factor), got {scale!r}."
            )
        return float(scale)

    @property
    def gain_follows(self) -> Literal["length", "scale"] | None:
        """The length of the text under `log_scale`, its scale under `log_gain`."""
        if self.config.log_gain:
            return "scale"
        return "length" if self.config.log_scale else None

    def query_gain(self, positions: mx.array | None, length: int, scale: float) -> float | None:
        """Return ln(length) / ln(L0) under `log_scale`: below 1 for texts shorter than L0.

        Under `log_gain`, `length` is that of the longest text of this scale, L0 * scale. The gain
        is 1 within L0, and texts of one scale can share cached keys and values.

        Source: the CLEX repository's CLEX/modeling_llama.py, FlashAttention path. `log_gain` is of
            this project (docs/benchmarks.md, "How far each method reaches").
        """
        if self.config.log_gain:
            length = round(scale * self.trained_length)
        elif not self.config.log_scale:
            return None
        return math.log(length) / math.log(self.trained_length)

    def differentiable_inv_freq(self, scale: Any, layer: int = 0) -> mx.array:
        """Return radians per token, float32, (D/2,), with gradients for W_up and W_down.

        The number of steps does not depend on `scale`, so a compiled training step is
        traced once for all scales.
        """
        act = _ACTIVATIONS[self.config.act][1]
        start, slope = (mx.array(a, mx.float32) for a in self._line())

        def rhs(u: mx.array, y: mx.array) -> mx.array:
            hidden = act((y + start - 2 * u * slope) @ self.up_proj)
            return mx.exp(u) / 2 * (hidden @ self.down_proj)

        # Equal in u, the last steps would span too many scales where max_factor is large.
        steps = max(_FEWEST_TRAINING_STEPS, math.ceil(4 * math.sqrt(self.config.max_factor)))
        root = mx.sqrt(2 * mx.array(scale, mx.float32) - 1)
        times = [2 * mx.log(1 + (root - 1) * (k / steps)) for k in range(steps + 1)]
        *_, y = solve(rhs, mx.zeros_like(start), times)
        return mx.exp(y + mx.array(np.log(self._base_inv_freq()), mx.float32) - slope * times[-1])

    def _solve(self, scale: float, layer: int) -> np.ndarray:
        self.check_scale(scale)
        if self._solved.state is None:
            self._solved.state = self._integrate()
        curve: _Curve = self._solved.state
        below = int(min(scale, self.config.max_factor))
        error = curve.errors[min(math.ceil(scale), self.config.max_factor) - 1]
        if not error <= _TOLERANCE:
            raise InputError(
                f"The frequencies of clex at scale {scale:g} cannot be computed: after "
                f"{curve.steps:,} steps ln inv_freq is uncertain by {error:.1g} "
                f"(allowed: {_TOLERANCE:g}). {self._largest_weight()}"
            )
        y = curve.y[below - 1]
        if scale != below:
            *_, y = solve(curve.rhs, y, _equal_steps(below, scale, curve.refinement))
        return curve.base * np.exp(y - curve.slope * math.log(2 * scale - 1))

    def _line(self) -> tuple[np.ndarray, np.ndarray]:
        """Return z(1) + ln n(1) and i/(D-2), the line in u that the network reads, (D/2,)."""
        i = np.arange(0, self.dims, 2)
        start = np.log(self._base_inv_freq()) - i / self.dims * math.log(NETWORK_BASE)
        return start, i / (self.dims - 2)

    def _integrate(self) -> "_Curve":
        """Return y at the scales 1..max_factor; double the steps until it is exact enough."""
        rhs = self._rhs()
        refinement = 1
        while True:
            times = [0.0]
            ends = [0]  # indices of the whole scales in `times`
            for t in range(1, self.config.max_factor):
                times += _equal_steps(t, t + 1, refinement)[1:]
                ends.append(len(times) - 1)
            pairs = list(solve_with_error(rhs, np.zeros(self.dims // 2), times))
            y, errors = (
                np.array([pair[side] for pair in pairs])[np.array(ends) // 2] for side in (0, 1)
            )
            # The largest so far, NaN included: a later scale builds on the earlier ones.
            errors = np.maximum.accumulate(errors.max(axis=1))
            if errors[-1] <= _TOLERANCE or 2 * len(times) > _MOST_STEPS:
                base, slope = self._base_inv_freq(), self._line()[1]
                return _Curve(rhs, refinement, len(times) - 1, y, errors, base, slope)
            refinement *= 2

    def _rhs(self) -> Rhs:
        """Return dy/du for NumPy, float64, of one solution or of several in rows."""
        act = _ACTIVATIONS[self.config.act][0]
        # NumPy has no bfloat16, to which `apply` may have cast all tensors of a model.
        up = np.array(self.up_proj.astype(mx.float32), np.float64)
        half_down = np.array(self.down_proj.astype(mx.float32), np.float64) / 2
        start, slope = self._line()
        # (y + start - 2 u slope) @ W_up, with all but y @ W_up multiplied out once.
        start_up, slope_up = start @ up, 2 * slope @ up

        def rhs(u: Any, y: np.ndarray) -> np.ndarray:
            return np.exp(u) * (act(y @ up + start_up - u * slope_up) @ half_down)

        return rhs


@dataclass(frozen=True)
class _Curve:
    """A solution at the scales 1..max_factor."""

    rhs: Rhs  # dy/du
    refinement: int  # steps / those of the first attempt
    steps: int  # in all
    y: np.ndarray  # (max_factor, D/2)
    errors: np.ndarray  # estimated, of ln inv_freq up to each scale, (max_factor,)
    base: np.ndarray  # the base model's frequencies, radians per token, (D/2,)
    slope: np.ndarray  # of the line in u, (D/2,)


def _equal_steps(t: float, later: float, refinement: int) -> list[float]:
    """Return times u = ln(2t - 1) from one scale to a later one, equally far apart."""
    steps = refinement * (8 if t < 2 else 4 if t < 4 else 2)
    return np.linspace(math.log(2 * t - 1), math.log(2 * later - 1), steps + 1).tolist()
