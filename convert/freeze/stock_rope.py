"""Write a scaling fixed at one scale as a config that stock programs read.

At one scale, a method is a list of frequencies and possibly a gain of the scores. Several config
entries may express them (another rope_theta, linear, yarn, longrope). Each entry is tried on the
program's own rotary embedding; the first one that gives the same rotation is used.

Not covered: frequencies for each head or layer and gains for each position, which no stock
program has.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_clex.checkpoint.config import BASE_ROPE, base_config
from mlx_clex.errors import InputError, import_extra, one_line
from mlx_clex.model.base_rope import stands_still
from mlx_clex.model.find_ropes import find_sites, ropes_in
from mlx_clex.model.rotary import rotate
from mlx_clex.model_file import Model, ModelArgs, get_stock_classes
from mlx_clex.scaling import Scaling
from mlx_clex.scaling.base import plain_inv_freq

from . import gguf_export

# Rotates (1, 1, 1, head_dim) at a position.
Rotation = Callable[[mx.array, int], mx.array]

_ROUNDING = 1e-6  # error of float32 angles, radians per token of position
_EVERY_LAYER = "it would change every layer, and mlx_clex scales only layers with full attention"
_SCORES = 1e-4  # error of scores between vectors of unit variance, at position 0


def frozen_config(
    config: dict[str, Any], scaling: Scaling, scale: float, program: str
) -> tuple[dict[str, Any], int]:
    """Return the config of a checkpoint that a stock program runs at one scale.

    Args:
        config: the config of the model, with its scaling.
        scaling: the scaling, with its weights.
        scale: the scale to fix, target length / trained length.
        program: "mlx-lm", "transformers" or "llama.cpp".

    Returns:
        The new config, and the length it is made for in tokens, scale x trained length.

    Raises:
        InputError: the scale is out of range, or the program's model of this family
            cannot express the rotation; the message has the reason.
    """
    scale = scaling.check_scale(scale)
    inv_freq = scaling.inv_freq(scale)
    if scaling.by_layer or inv_freq.ndim > 1:
        raise InputError(
            f"--freeze: {config['rope_scaling']['type']} has other frequencies for every head "
            "and layer, which no stock program can express. Use it with mlx_clex."
        )
    if scaling.gain_follows == "position":
        raise InputError(
            "--freeze: log_scale gives every position its own gain, which no stock program can "
            "express. Use it with mlx_clex."
        )
    length = round(scale * scaling.trained_length)
    gain = scaling.query_gain(None, length, scale)
    ours = _Ours(scaling, scale, 1.0 if gain is None else float(gain))
    text = config.get("text_config") or config
    head_dim = text.get("head_dim")
    if head_dim is None and {"hidden_size", "num_attention_heads"} <= text.keys():
        head_dim = text["hidden_size"] // text["num_attention_heads"]
    width = max(head_dim or 0, scaling.dims)
    stock = _stock_ropes(config, width)
    if program != "mlx-lm" and any(rope.turns and not rope.scaled for rope in stock):
        raise InputError(
            f"--freeze {scale:g} cannot be expressed for {program}: {_EVERY_LAYER}. Use the "
            "unfrozen checkpoint with mlx_clex."
        )
    dropped = ("model_file", "log_scale", BASE_ROPE)
    base = {key: value for key, value in config.items() if key not in dropped}
    base |= {"rope_scaling": None, "head_dim": head_dim, "max_position_embeddings": length}
    if program == "llama.cpp":
        gguf_export.check(config)
        factors = plain_inv_freq(scaling.dims, scaling.base) / np.array(inv_freq, np.float64)
        entry = {"factors": factors.tolist(), "query_gain": ours.score_gain}
        theta = {"rope_theta": scaling.base}
        return base | theta | {"rope_scaling": {"type": gguf_export.ROPE, **entry}}, length
    build = _mlx_rotations
    if program == "transformers":
        import_extra("torch", "bin", "Freezing for transformers")
        build = _transformers_rotations
        stock = [rope for rope in stock if rope.scaled][:1]  # one embedding for all layers
    trial = _Trial(build, ours, stock, width, length)
    errors = {}
    for change in _candidates(scaling, scale, length, ours.score_gain):
        candidate = base | change
        ropes = trial.build(candidate)
        errors[_kind(change)] = error = trial.error(ropes)
        if ropes and error <= 1 and trial.keeps_others(ropes):
            return {k: v for k, v in candidate.items() if v is not None}, length
    nearest = min(errors, key=errors.__getitem__)
    if trial.alike(trial.build(base), trial.build(base | change)):
        reason = f"{program}'s model for {config['model_type']} ignores rope_scaling"
    elif errors[nearest] <= 1:
        reason = f"with {nearest}, {_EVERY_LAYER}"
    elif math.isinf(errors[nearest]):
        reason = f"its model does not run with another rope ({trial.failure})"
    else:
        reason = (
            f"the error of its nearest rope, {nearest}, is {errors[nearest]:.1g} times the "
            "rounding error"
        )
    elsewhere = program == "mlx-lm" and all(rope.scaled or not rope.turns for rope in stock)
    advice = " or freeze it with --for transformers" if elsewhere else ""
    raise InputError(
        f"--freeze {scale:g} cannot be expressed for {program}: {reason}. Use the unfrozen "
        f"checkpoint with mlx_clex{advice}."
    )


class _Ours:
    """The rotation of queries and keys by mlx_clex at the frozen scale."""

    def __init__(self, scaling: Scaling, scale: float, query_gain: float) -> None:
        self.inv_freq = scaling.inv_freq(scale)
        self.query_gain = query_gain
        self.rotary_gain = scaling.rotary_gain(scale)

    @property
    def score_gain(self) -> float:
        """The factor of the scores of fully rotated heads."""
        return self.query_gain * self.rotary_gain**2

    def keys(self, x: mx.array, position: int) -> mx.array:
        dims = 2 * self.inv_freq.shape[-1]
        y = rotate(x, self.inv_freq, position)
        return mx.concatenate([y[..., :dims] * self.rotary_gain, y[..., dims:]], axis=-1)

    def queries(self, x: mx.array, position: int) -> mx.array:
        return self.keys(x, position) * self.query_gain


def _candidates(
    scaling: Scaling, scale: float, length: int, score_gain: float
) -> Iterator[dict[str, Any]]:
    """Yield config entries that may express the frozen scaling, the simplest first."""
    inv_freq = np.array(scaling.inv_freq(scale), np.float64)
    exponents = np.arange(0, scaling.dims, 2) / scaling.dims
    theta = float(inv_freq[-1] ** (-1 / exponents[-1]))
    if np.allclose(theta**-exponents, inv_freq, rtol=1e-6, atol=0) and score_gain == 1:
        yield {"rope_theta": theta}
    yield _entry("linear", factor=scale)
    stock = scaling.stock_entry(scale)
    if stock is not None:
        yield _entry(stock.pop("type"), **stock)
    factors = (plain_inv_freq(scaling.dims, scaling.base) / inv_freq).tolist()
    # longrope multiplies queries and keys by sqrt(ln length / ln original).
    original = length ** (1 / score_gain)
    if math.isclose(original, round(original), rel_tol=1e-9):
        original = round(original)
    fields = {"short_factor": factors, "long_factor": factors}
    yield _entry("longrope", **fields, original_max_position_embeddings=original)


def _entry(kind: str, **fields: Any) -> dict[str, Any]:
    # mlx-lm and older programs read `type`, transformers `rope_type`.
    return {"rope_scaling": {"type": kind, "rope_type": kind, **fields}}


def _kind(change: dict[str, Any]) -> str:
    return change["rope_scaling"]["type"] if "rope_scaling" in change else "another rope_theta"


def _difference(theirs: Any, ours: Any, head_dim: int, length: int) -> float:
    """Return the largest difference of scores / the error of float32 rounding."""
    shape = (1, 1, 1, head_dim)
    queries, keys = (mx.random.normal(shape, key=mx.random.key(seed)) for seed in (0, 1))
    worst = 0.0
    for at in {0, 1, 7, 100, length // 3, length - 1}:
        for other in {0, at // 2, at}:
            scores = [
                (side.queries(queries, at) * side.keys(keys, other)).sum() / math.sqrt(head_dim)
                for side in (theirs, ours)
            ]
            error = abs(scores[0].item() - scores[1].item())
            if not math.isfinite(error):
                return math.inf  # NaN would pass for the smallest error
            worst = max(worst, error / (_SCORES + _ROUNDING * at))
    return worst


class _Theirs:
    """The rotation of a stock program, the same for queries and keys."""

    def __init__(self, rotation: Rotation) -> None:
        self.queries = self.keys = rotation


class _StockRope(NamedTuple):
    rotation: _Theirs
    scaled: bool  # mlx_clex replaces it
    turns: bool  # some families have ropes that do nothing


class _Trial:
    """Compares the ropes of a stock program with what the frozen model needs.

    Args:
        build: returns the ropes that a config gives, as many as `stock` and in its order.
        ours: the frozen rotation.
        stock: the ropes of the unfrozen stock model.
        width: dimensions of the compared queries and keys.
        length: the longest position, in tokens.
    """

    def __init__(
        self,
        build: Callable[[dict[str, Any]], list[_Theirs]],
        ours: _Ours,
        stock: list[_StockRope],
        width: int,
        length: int,
    ) -> None:
        self._build = build
        self._ours = ours
        self._stock = stock
        self._sizes = (width, length)
        self.failure = "it has other ropes"  # why a model was not built or not run

    def build(self, config: dict[str, Any]) -> list[_Theirs] | None:
        """Return the ropes of a config, or None if it has no such model."""
        try:
            ropes = self._build(config)
        except Exception as error:  # model files and config classes may raise any exception
            self.failure = one_line(error)
            return None
        return ropes if len(ropes) == len(self._stock) else None

    def error(self, ropes: list[_Theirs] | None) -> float:
        """Return the error of the scaled ropes / the rounding error."""
        if ropes is None:
            return math.inf
        return self._worst([(rope, self._ours) for rope in self._chosen(ropes, scaled=True)])

    def keeps_others(self, ropes: list[_Theirs]) -> bool:
        """Return whether the other ropes rotate as in the unfrozen model."""
        before = self._chosen([rope.rotation for rope in self._stock], scaled=False)
        return self._worst(list(zip(self._chosen(ropes, scaled=False), before, strict=True))) <= 1

    def alike(self, some: list[_Theirs] | None, others: list[_Theirs] | None) -> bool:
        """Return whether the scaled ropes of two configs are the same."""
        if some is None or others is None:
            return False
        chosen = (self._chosen(ropes, scaled=True) for ropes in (some, others))
        return self._worst(list(zip(*chosen, strict=True))) <= 1

    def _chosen(self, ropes: list[_Theirs], *, scaled: bool) -> list[_Theirs]:
        return [
            rope for rope, stock in zip(ropes, self._stock, strict=True) if stock.scaled == scaled
        ]

    def _worst(self, pairs: list[tuple[Any, Any]]) -> float:
        try:
            # Most layers have the same rope, and a full comparison takes many small steps.
            distinct = {tuple(_trace(rope, *self._sizes) for rope in pair): pair for pair in pairs}
            differences = [_difference(*pair, *self._sizes) for pair in distinct.values()]
        except Exception as error:  # ropes of model files may raise any exception
            self.failure = one_line(error)
            return math.inf
        return max(differences, default=0.0)


def _trace(rope: Any, width: int, length: int) -> bytes:
    """Return a rotated random vector, which tells different ropes apart."""
    x = mx.random.normal((1, 1, 1, width), key=mx.random.key(2))
    turned = [turn(x, at) for turn in (rope.queries, rope.keys) for at in (1, length - 1)]
    return np.array(mx.concatenate(turned)).tobytes()


def _ropes_of(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return the ropes of a model with their owners and names, in the order of its modules."""
    return [(owner, *rope) for owner in model.modules() for rope in ropes_in(owner)]


def _rotation_of(rope: Any) -> _Theirs:
    return _Theirs(lambda x, position: rope(x, offset=position))


def _stock_ropes(config: dict[str, Any], width: int) -> list[_StockRope]:
    """Return the ropes of the unfrozen model without its scaling."""
    model = Model(ModelArgs.from_dict(base_config(config)))
    sites = {(id(site.owner), site.name) for site in find_sites(model)}
    x = mx.ones((1, 1, 1, width))
    ropes = []
    for owner, name, rope in _ropes_of(model):
        scaled = (id(owner), name) in sites
        ropes.append(_StockRope(_rotation_of(rope), scaled, scaled or not stands_still(rope, x)))
    return ropes


def _mlx_rotations(config: dict[str, Any]) -> list[_Theirs]:
    """Return the rotations of all ropes of mlx-lm's model for this config."""
    model_class, args_class = get_stock_classes(config)
    model = model_class(args_class.from_dict(config))
    return [_rotation_of(rope) for _, _, rope in _ropes_of(model)]


def check_names(config: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> None:
    """Refuse tensors that transformers' model of this config does not have.

    Raises:
        InputError: there is one, for example in Mixtral, whose experts are one tensor in MLX.
    """
    torch = import_extra("torch", "bin", "Freezing for transformers")
    from transformers import AutoModelForCausalLM

    settings, _ = _transformers_family(config)
    with torch.device("meta"):
        known = AutoModelForCausalLM.from_config(settings).state_dict()
    for name, array in tensors.items():
        if name not in known or tuple(known[name].shape) != tuple(array.shape):
            raise InputError(
                f"--for transformers: transformers has no tensor {name} of shape "
                f"{tuple(array.shape)}. Give the published checkpoint instead of the converted one."
            )


def _transformers_family(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return transformers' config object and module for a model."""
    from transformers import AutoConfig

    family = config["model_type"]
    try:
        # A copy, because transformers writes rope_theta into rope_scaling.
        given = deepcopy({k: v for k, v in config.items() if v is not None})
        return AutoConfig.for_model(**given), import_module(
            f"transformers.models.{family}.modeling_{family}"
        )
    except Exception as error:  # config classes raise anything on settings they do not take
        raise InputError(
            f"transformers has no model for {family} with these settings: {one_line(error)}"
        ) from error


def _transformers_rotations(config: dict[str, Any]) -> list[_Theirs]:
    """Return the rotation of transformers' rotary embedding for this config."""
    torch = import_extra("torch", "bin", "Freezing for transformers")
    settings, module = _transformers_family(config)
    embedding = next(v for k, v in vars(module).items() if k.endswith("RotaryEmbedding"))(settings)

    def rotation(x: mx.array, position: int) -> mx.array:
        with torch.no_grad():
            cos, sin = embedding(torch.zeros(1), torch.tensor([[position]]))
        cos, sin = (mx.array(table.numpy()) for table in (cos, sin))
        rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = mx.split(rotated, 2, axis=-1)
        turned = rotated * cos + mx.concatenate([-second, first], axis=-1) * sin
        return mx.concatenate([turned, rest], axis=-1)

    return [_Theirs(rotation)]
