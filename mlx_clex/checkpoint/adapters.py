"""Find adapters in a folder, check them and add them to a model.

The folder has mlx-lm's files and up to two more: the trained tensors of the scaling, and the
trained norms and embeddings.

Not covered: writing adapters (`training/saves.py`).
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_adapters

from ..errors import InputError, one_line
from ..model.scaled_model import ScaledModel, attach
from .digest import weights_digest
from .files import read_json

ADAPTER_SCALING = "scaling.safetensors"  # the scaling's tensors, where they were trained
EXTRA_WEIGHTS = "norms_embeddings.safetensors"  # norms and embeddings, likewise
_TYPES = ("lora", "dora", "full", "scaling")  # fine_tune_type of adapter_config.json
_LEAVES = ("lora_a", "lora_b", "m")  # tensors of an adapted layer; m only in DoRA's
CURRENT = "current"  # a link to the newest save


def adapter_files(folder: Path) -> Path:
    """Return the folder that has the files of the newest save.

    Raises:
        InputError: the folder has no adapter_config.json.
    """
    # Resolved once, so that all files come from one save while training writes the next.
    folder = (folder / CURRENT).resolve() if (folder / CURRENT).is_dir() else folder
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} has no adapter_config.json. Give the folder that training wrote."
        )
    return folder


def add_adapters(model: nn.Module, folder: Path, scale: float | None) -> None:
    """Load the adapters in a folder and add them to the model.

    Args:
        model: the base model; it is changed.
        folder: the folder that training wrote.
        scale: fixed scale of a scaling that the adapters bring; None follows the length.

    Raises:
        InputError: a file is missing or broken, or the adapters do not fit the model.
    """
    folder = adapter_files(folder)
    try:
        settings = read_json(folder / "adapter_config.json")
        for setting, name in (("scaling", ADAPTER_SCALING), ("extra", EXTRA_WEIGHTS)):
            if settings.get(f"trained_{setting}") and not (folder / name).is_file():
                raise InputError(
                    f"{folder} lacks {name}, which was trained with its adapters. Copy the whole "
                    "folder."
                )
        if settings.get("rope_scaling"):
            # The base model has no scaling of its own; training attached this one.
            length = settings.get("trained_length")
            attach(
                model,
                settings["rope_scaling"],
                trained_length=length,
                scale=scale,
                own_rope=settings.get("own_rope"),
            )
        _check_type(settings, folder)
        load_adapters(model, str(folder))
        _check_adapters(model, settings, folder / "adapters.safetensors")
        scaling_file, extra_file = folder / ADAPTER_SCALING, folder / EXTRA_WEIGHTS
        if scaling_file.is_file():
            if not isinstance(model, ScaledModel):
                raise InputError(
                    f"{scaling_file} needs a model with a scaling. Give the model that the "
                    "adapters were trained on."
                )
            weights: Any = mx.load(str(scaling_file))
            model.scaling.take_weights(weights)
        if extra_file.is_file():
            extra: Any = mx.load(str(extra_file))
            known: Any = dict(tree_flatten(model.parameters()))
            for name, array in extra.items():
                if name not in known or known[name].shape != array.shape:
                    raise InputError(
                        f"{extra_file} has the tensor {name}, shape {tuple(array.shape)}, which "
                        "this model lacks. Give the model that the adapters were trained on."
                    )
            model.load_weights(list(extra.items()), strict=False)
    except InputError:
        raise
    except (
        ValueError,
        RuntimeError,
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise InputError(f"The adapters in {folder} cannot be loaded: {one_line(error)}") from error
    model.eval()


def _check_type(settings: dict[str, Any], folder: Path) -> None:
    """Refuse a fine_tune_type that mlx-lm would read as LoRA."""
    kind = settings.get("fine_tune_type", "lora")
    if kind not in _TYPES:
        raise InputError(
            f"{folder / 'adapter_config.json'} has fine_tune_type {kind!r}; there is: "
            f"{', '.join(_TYPES)}."
        )


def _check_adapters(model: nn.Module, settings: dict[str, Any], file: Path) -> None:
    """Refuse a file without some of the tensors that its adapter_config.json asks for.

    mlx-lm checks only that the model has every tensor of the file. What the file lacks it
    leaves as it starts: without effect, or of random values. It must be refused before it is
    computed, since adapter_config.json may ask for any rank.
    """
    given: Any = mx.load(str(file))
    parameters: Any = tree_flatten(model.parameters())
    names = [name for name, _ in parameters]
    if settings.get("fine_tune_type") == "full":
        layers: Any = model.layers
        trained = {id(layer) for layer in layers[-max(settings["num_layers"], 0) :]}
        inside = tuple(f"{n}." for n, module in model.named_modules() if id(module) in trained)
        wanted = [name for name in names if name.startswith(inside)]
    else:
        adapted = {name.removesuffix("lora_a") for name in names if name.endswith(".lora_a")}
        parts = {prefix + leaf for prefix in adapted for leaf in _LEAVES}
        wanted = [name for name in names if name in parts]
    missing = next((name for name in wanted if name not in given), None)
    if missing is not None:
        raise InputError(
            f"{file} lacks {missing}, which its adapter_config.json asks for. Copy the whole "
            "folder that training wrote."
        )


def other_base(folder: Path, adapters: Path) -> str | None:
    """Return a warning if adapters were trained on other weights than the model's, else None.

    Other weights can be intended: adapters trained on a quantised model also fit the
    unquantised one.

    Args:
        folder: the folder of the model.
        adapters: the folder of the adapters.
    """
    config = read_json(adapter_files(adapters) / "adapter_config.json")
    trained_on = config.get("base_weights")
    if trained_on is None or trained_on == weights_digest(folder):
        return None
    return (
        f"The adapters in {adapters} were trained on {config.get('model')}, whose weights differ "
        f"from those of {folder}. They fit only that model and its quantised copies."
    )
