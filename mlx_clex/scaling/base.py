"""The interface of every scaling: a scale for a length, frequencies for a scale.

A scaling knows only the rotary embedding of its base model: rotated dimensions, base and trained
length. `model/rotary.py` and `model/scaled_model.py` apply its frequencies in the attention.

Not covered: rotation, caches, and the length of a pass.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from .config import parse_config
from .procedure import Procedure

PREFIX = "scaling."  # prefix of the names of learned tensors in a checkpoint


def plain_inv_freq(dims: int, base: float) -> np.ndarray:
    """Return the frequencies of a plain rope, radians per token, (dims / 2,)."""
    return base ** -(np.arange(0, dims, 2) / dims)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


@dataclass(frozen=True, kw_only=True)
class RotaryShape:
    """The rotary embedding of the base model, and the heads that share it."""

    dims: int  # D, rotated dimensions of a head
    base: float  # rope_theta
    trained_length: int  # L0, tokens
    inv_freq: tuple[float, ...] | None = None  # radians per token, (D/2,); None: plain
    gain: float = 1.0  # gain of the base model's rope, on rotated dimensions of queries and keys
    heads: int | None = None  # query heads; needed by gene-param
    key_heads: int | None = None  # key heads; needed by gene-param
    layers: int | None = None  # layers; needed by gene-param

    def __post_init__(self) -> None:
        for name in ("heads", "key_heads", "layers"):
            if (value := getattr(self, name)) is not None and not _whole(value, 1):
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if not _whole(self.dims, 4) or self.dims % 2:
            raise InputError(
                f"The rotated dimensions of a head must be even and at least 4, got "
                f"{self.dims!r}; check head_dim and partial_rotary_factor in config.json."
            )
        if not (isinstance(self.base, Real) and 1 < self.base <= sys.float_info.max):
            raise InputError(f"rope_theta must be greater than 1, got {self.base!r}.")
        if not (0 < self.gain < math.inf):
            raise InputError(f"The gain of the base rope must be greater than 0, got {self.gain}.")
        if self.inv_freq is not None and len(self.inv_freq) != self.dims // 2:
            raise InputError(
                f"inv_freq must have one frequency for each of {self.dims // 2} pairs, got "
                f"{len(self.inv_freq)}."
            )
        for inv_freq in self.inv_freq or ():
            if not (0 < inv_freq < math.inf):
                raise InputError(
                    f"The frequencies in inv_freq must be finite and above 0, got {inv_freq}."
                )
        if not _whole(self.trained_length, 2):
            raise InputError(
                f"The trained length must be a whole number of at least 2 tokens, got "
                f"{self.trained_length!r}; check max_position_embeddings in config.json."
            )


class Scaling(nn.Module, ABC):
    """How the frequencies of a rotary embedding change with the length of the text.

    Learned tensors are parameters of this module, so they load, save and train like
    those of any layer. Implementations are final: none overrides another.
    """

    name: ClassVar[str]  # the `type` of its rope_scaling entry
    Config: ClassVar[type]  # a frozen dataclass; its fields are the config's keys
    in_transformers: ClassVar[bool] = False  # transformers has a rope type of this name
    published: ClassVar[bool] = False  # released checkpoints have their own format
    static: ClassVar[bool] = False  # the scale is the same for every length
    hard_reach: ClassVar[bool] = False  # sequences longer than `reach` are refused
    by_layer: ClassVar[bool] = False  # every layer has its own frequencies
    learned: ClassVar[tuple[str, ...]] = ()  # names of the learned tensors
    untrained: ClassVar[str] = ""  # the method it equals before training
    learning_rate_share: ClassVar[float] = 1.0  # their learning rate / the model's
    released_procedure: ClassVar[Procedure] = Procedure()  # as in its paper

    def __init__(self, config: Any = None, **shape: Any) -> None:
        """Fit the scaling to a base model.

        Args:
            config: an instance of `Config`; None takes its defaults.
            shape: the fields of `RotaryShape`: dims, base, trained_length, and for
                gene-param heads, key_heads and layers.

        Raises:
            InputError: a value is out of range; the message names it.
        """
        super().__init__()
        self.config = self.Config() if config is None else config
        self.shape = RotaryShape(**shape)
        self._solved = _Solved()

    @property
    def dims(self) -> int:
        """D, the rotated dimensions of a head."""
        return self.shape.dims

    @property
    def base(self) -> float:
        """rope_theta of the base model."""
        return self.shape.base

    @property
    def trained_length(self) -> int:
        """L0, the length the base model was trained at, in tokens."""
        return self.shape.trained_length

    @abstractmethod
    def scale_at(self, length: int) -> float:
        """Return the scale for a sequence of `length` tokens; it never falls with length."""

    @abstractmethod
    def _solve(self, scale: float, layer: int) -> np.ndarray:
        """Return the inverse frequencies at `scale`, float64, (D/2,) or (H, D/2)."""

    def inv_freq(self, scale: float, layer: int = 0) -> mx.array:
        """Return the frequencies at `scale`; each scale is solved once and kept.

        Args:
            scale: target length / trained length, no unit, at least 1.
            layer: index of the layer; used only by gene-param, which has frequencies per layer.

        Returns:
            Radians per token, float32, shape (D/2,), or (H, D/2) where every head has
            its own frequencies.
        """
        return self._table(scale, layer if self.by_layer else 0)[0]

    def periods(self, scale: float) -> mx.array:
        """Return 1 / inv_freq in tokens per radian, the `freqs` of `mx.fast.rope`."""
        return self._table(scale, 0)[1]

    def differentiable_inv_freq(self, scale: Any, layer: int = 0) -> mx.array:
        """Return `inv_freq` as a function of the learned tensors, for training.

        Arguments and result are those of `inv_freq`. If there are learned tensors, `scale` may
        also be a scalar array, so that one compiled step serves every scale.
        """
        return self.inv_freq(float(scale), layer)

    @property
    def reach(self) -> int | None:
        """The longest sequence the scaling is made for, in tokens; None: any length."""
        return None

    @property
    def reach_reason(self) -> str:
        """Where `reach` comes from, for messages."""
        return f"trained length {self.trained_length}"

    @property
    def grows(self) -> bool:
        """Whether the scale follows sequences longer than `reach`."""
        return not self.static and not self.hard_reach

    @property
    def largest_scale(self) -> float:
        """The largest scale that training draws."""
        return 1.0 if self.reach is None else self.reach / self.trained_length

    @property
    def procedure(self) -> Procedure:
        """The default way in which training draws scales and positions."""
        return self.released_procedure

    @property
    def gain_follows(self) -> Literal["length", "position", "scale"] | None:
        """What the gain on queries depends on; None: they have none."""
        return None

    def query_gain(self, positions: mx.array | None, length: int, scale: float) -> Any:
        """Return the factor of queries after rotation, or None for no factor.

        Args:
            positions: positions of the queries from 0, in tokens, (L,) or (B, L); read
                only where the gain follows them.
            length: length of the sequence, in tokens; read only where the gain follows it.
            scale: scale of the pass; read only where the gain follows it.

        Returns:
            None, a number for the whole pass, or an array of the shape of `positions`.
        """
        return None

    def rotary_gain(self, scale: float) -> float:
        """Return the factor of the rotated dimensions of queries and keys.

        It depends on the scale only if the scaling is `static`: cached keys would keep the factor
        of an old scale.
        """
        return self.shape.gain

    def check_scale(self, scale: float) -> float:
        """Return `scale` if the model can be fixed at it.

        Raises:
            InputError: it is out of range; the message has the range.
        """
        if not (isinstance(scale, Real) and 1 <= scale < math.inf):
            raise InputError(f"The scale must be a finite number of at least 1, got {scale!r}.")
        return float(scale)

    def keep_heads(self, rank: int, size: int) -> None:
        """Keep only the frequencies of this process's heads.

        Does nothing for methods with the same frequencies in all heads.

        Args:
            rank: index of the process, from 0; the heads are split in equal parts.
            size: number of processes.
        """

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names in a checkpoint and the shapes of the learned tensors."""
        return {PREFIX + name: tuple(self[name].shape) for name in self.learned}

    def take_weights(self, weights: Mapping[str, mx.array]) -> None:
        """Set the learned tensors, named as in a checkpoint, in float32.

        Raises:
            InputError: a tensor is missing, unknown or of another shape.
        """
        expected = self.weight_shapes()
        given = {k: v for k, v in weights.items() if k.startswith(PREFIX)}
        for name in expected.keys() - given.keys():
            raise InputError(
                f"The checkpoint lacks the tensor {name}, shape {expected[name]}. Was "
                "it converted with mlx_clex convert?"
            )
        for name in given.keys() - expected.keys():
            raise InputError(
                f"The checkpoint has the tensor {name}, which its rope_scaling does "
                f"not use (it uses: {', '.join(expected) or 'none'})."
            )
        for name, shape in expected.items():
            if tuple(given[name].shape) != shape:
                raise InputError(
                    f"The tensor {name} has shape {tuple(given[name].shape)}, the config "
                    f"asks for {shape}; check rope_scaling and head_dim in config.json."
                )
            self[name.removeprefix(PREFIX)] = mx.array(given[name], mx.float32)
        self.check_weights()

    def check_weights(self) -> None:
        """Refuse learned tensors that are not finite.

        Raises:
            InputError: the message names the tensor.
        """
        for name in self.learned:
            if not mx.isfinite(self[name]).all().item():
                raise InputError(
                    f"The tensor {PREFIX}{name} has values that are not finite (NaN or infinity). "
                    "The file is damaged or its training diverged: use an earlier save."
                )

    def _base_inv_freq(self) -> np.ndarray:
        """Return the base model's frequencies, radians per token, float64, (D/2,)."""
        if self.shape.inv_freq is not None:
            return np.array(self.shape.inv_freq)
        return plain_inv_freq(self.dims, self.base)

    def _table(self, scale: float, layer: int) -> tuple[mx.array, mx.array]:
        solved = self.use_current_weights()
        table = solved.tables.get((scale, layer))
        if table is None:
            inv_freq = self.finite_inv_freq(scale, layer)
            # Both are computed on the host: a lazy 1 / inv_freq would belong to the stream
            # of this thread, and a server generates in another one.
            with np.errstate(divide="ignore", over="ignore"):
                table = (
                    mx.array(inv_freq.astype(np.float32)),
                    mx.array((1 / inv_freq).astype(np.float32)),
                )
            solved.tables[scale, layer] = table
        return table

    def use_current_weights(self) -> "_Solved":
        """Return what is solved with the current weights; drop what older weights gave.

        Another object than before means other weights.
        """
        solved = self._solved
        weights = tuple(self[name] for name in self.learned)
        if any(a is not b for a, b in zip(weights, solved.weights, strict=False)):
            solved = self._solved = _Solved()
        solved.weights = weights
        return solved

    def finite_inv_freq(self, scale: float, layer: int) -> np.ndarray:
        """Return the frequencies of `_solve`, float64, (D/2,) or (H, D/2).

        Raises:
            InputError: the scale is out of range, or float32 cannot hold them; the message has
                the method, scale and pair.
        """
        Scaling.check_scale(self, scale)
        self.use_current_weights()
        try:
            with np.errstate(all="ignore"):
                inv_freq = self._solve(scale, layer)
                finite = np.isfinite(inv_freq.astype(np.float32))
            gain = self.rotary_gain(scale)
        except OverflowError:  # from Python's own numbers
            finite, gain = np.zeros(1, bool), 1.0
        if finite.all() and math.isfinite(gain):
            return inv_freq
        what = "gain" if finite.all() else f"frequency of pair {np.argwhere(~finite)[0][-1]}"
        raise InputError(
            f"The {what} of {self.name} at scale {scale:g} is not finite. {self._largest_weight()}"
        )

    def _largest_weight(self) -> str:
        """Return advice for frequencies that cannot be used."""
        if not self.learned:
            return "Choose a smaller factor."
        largest = {name: mx.abs(self[name]).max().item() for name in self.learned}
        values = ", ".join(f"{PREFIX}{name} {value:.3g}" for name, value in largest.items())
        return (
            f"The learned tensors are too large (largest values: {values}): train with a lower "
            "learning rate, or use an earlier save."
        )

    def entry(self) -> dict[str, Any]:
        """Return the rope_scaling entry of a config.json, with every field."""
        return {"type": self.name, **asdict(self.config)}

    def stock_entry(self, scale: float) -> dict[str, Any] | None:
        """Return an entry of mlx-lm and transformers for one scale, or None.

        Args:
            scale: target length / trained length.
        """
        return None

    @classmethod
    def from_release(cls, entry: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        """Return the entry with the settings that released configs leave out.

        Args:
            entry: rope_scaling.
            config: config.json; settings of the method outside `entry` are removed from it.
        """
        return dict(entry)

    @classmethod
    def options_for(cls, factor: float) -> dict[str, float]:
        """Return `Config` fields for a reach of `factor` times the trained length.

        Empty if the scale follows the text in any case.
        """
        return {}

    @classmethod
    def from_config(cls, rope_scaling: Mapping[str, Any], **shape: Any) -> Self:
        """Return a scaling built from a rope_scaling entry; refuse unknown keys."""
        return cls(parse_config(cls.Config, rope_scaling), **shape)


class _Solved:
    """Frequencies already solved, and the weights they were solved with.

    A separate class, because `nn.Module` would treat a dict as parameters.
    """

    def __init__(self) -> None:
        self.weights: tuple[mx.array, ...] = ()
        self.tables: dict[tuple[float, int], tuple[mx.array, mx.array]] = {}
        self.state: Any = None  # data that a solver keeps between scales
