"""Name, config and caches of a stock mlx-lm model.

For a model with a scaling, the functions describe its stock class.
"""

import dataclasses
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..errors import InputError

_WHOLE = "_whole_config"  # attribute with the config.json of a model


def check_model(model: Any) -> None:
    """Refuse what is no model, such as both results of `load`."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"A model of mlx-lm is needed, got {type(model).__name__}; load returns the model and "
            "its tokenizer."
        )


def model_name(model: Any) -> str:
    """Return the name of the stock class in mlx-lm."""
    stock = stock_class(model)
    return f"{stock.__module__}.{stock.__qualname__}"


def stock_class(model: Any) -> type:
    """Return the class that a model had before `attach`."""
    return getattr(type(model), "stock_class", type(model))


def stock_caches(model: Any) -> list[Any]:
    """Return the caches that the stock model makes for a new sequence."""
    stock: Any = stock_class(model)
    if hasattr(stock, "make_cache"):
        return list(stock.make_cache(model))
    return [KVCache() for _ in model.layers]


def model_args(model: nn.Module) -> Any:
    """Return the config that the model keeps: a dataclass in most families, or None."""
    return getattr(model, "args", getattr(model, "config", None))


def keep_config(model: nn.Module, config: dict[str, Any]) -> None:
    """Keep the whole config; some classes of mlx-lm drop the length and the rope from theirs."""
    # Not a plain assignment: `nn.Module` would treat a dict as parameters.
    object.__setattr__(model, _WHOLE, config)


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the model's config as a dict, empty if it keeps none."""
    if _WHOLE in vars(model):
        return dict(vars(model)[_WHOLE])
    args = model_args(model)
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        return dataclasses.asdict(args)
    return dict(args) if isinstance(args, dict) else {}


def config_value(model: nn.Module, name: str) -> Any:
    """Return a field of the model's config or of its text config, or None."""
    args = model_args(model)
    for config in (args, getattr(args, "text_config", None)):
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value is not None:
            return value
    return None
