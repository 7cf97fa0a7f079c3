"""Cast, quantise and dequantise the output lazily, with mlx-lm's functions.

Not covered: the scaling's tensors, which stay float32.
"""

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import dequantize_model, infer_quant_config, quantize_model

from mlx_clex.errors import InputError

from ..options import DTYPES, Options


def quantize_like_source(
    model: nn.Module, config: dict[str, Any], weights: Mapping[str, mx.array]
) -> None:
    """Give the model the quantised layers that an MLX source already has."""
    quantization = config.get("quantization")
    if quantization is None:
        return

    def like_source(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        return infer_quant_config(path, module, weights)

    try:
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=like_source,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"config.json has quantization {quantization!r}, which mlx does not accept: {error}."
        ) from error


def cast_and_quantize(
    model: Any, config: dict[str, Any], options: Options, notes: list[str]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Apply --dtype, -q and -d as mlx_lm.convert does.

    Returns:
        The new config, and what the weights that -q quantises are made from, by their names.
    """
    unquantised: dict[str, mx.array] = {}
    dtype = options.dtype or config.get("torch_dtype") or config.get("dtype")
    if dtype in DTYPES:
        keep = getattr(model, "cast_predicate", lambda _: True)
        mlx_type = getattr(mx, dtype)

        def to_type(path: str, array: mx.array) -> mx.array:
            floating = mx.issubdtype(array.dtype, mx.floating)
            return array.astype(mlx_type) if floating and keep(path) else array

        model.update(tree_map_with_path(to_type, model.parameters()))
        config["torch_dtype"] = dtype
        config.pop("dtype", None)
    if options.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        dequantize_model(model)
    if options.quantize:
        if "quantization" in config:
            raise InputError("The checkpoint is already quantised: dequantise it with -d first.")
        recipe = options.quant_predicate
        predicate = None
        before: Any = tree_flatten(model.parameters())
        if recipe:
            group = options.q_group_size or 64
            predicate = mixed_quant_predicate_builder(recipe, model, group)
        try:
            with redirect_stdout(StringIO()) as printed:
                _, config = quantize_model(
                    model,
                    config,
                    options.q_group_size,
                    options.q_bits,
                    mode=options.q_mode,
                    quant_predicate=predicate,
                )
        except ValueError as error:
            raise InputError(f"mlx does not accept these quantisation options: {error}.") from error
        if not any(hasattr(module, "bits") for module in model.modules()):
            raise InputError(
                f"-q would quantise nothing: no layer's width is a multiple of --q-group-size "
                f"{config['quantization']['group_size']}. Give another one, 32 or 64."
            )
        after: Any = dict(tree_flatten(model.parameters()))
        unquantised = {name: a for name, a in before if after[name].dtype != a.dtype}
        notes.append(printed.getvalue().removeprefix("[INFO]").strip())
    return config, unquantised
