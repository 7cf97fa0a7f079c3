"""Find adapters in a folder, check them and add them to a model.

The folder has mlx-lm's files and up to two more: the trained tensors of the scaling, and the
trained norms and embeddings. Or it is one of PEFT (`peft_adapters.py`).

Not covered: writing adapters (`training/saves.py`).
"""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import load_adapters

from ..errors import InputError, reading
from ..model.scaled_model import ScaledModel, attach
from .digest import weights_digest
from .files import read_json
from .peft_adapters import PEFT_WEIGHTS, PeftAdapters, is_peft, read_peft

ADAPTERS = "adapters.safetensors"
ADAPTER_SCALING = "scaling.safetensors"  # the scaling's tensors, where they were trained
EXTRA_WEIGHTS = "norms_embeddings.safetensors"  # norms and embeddings, likewise
_TYPES = ("lora", "dora", "full", "scaling")  # fine_tune_type of adapter_config.json
_LEAVES = ("lora_a", "lora_b", "m")  # tensors of an adapted layer; m only in DoRA's
CURRENT = "current"  # a link to the newest save
_LINEAR, _EMBEDDINGS = (nn.Linear, nn.QuantizedLinear), (nn.Embedding, nn.QuantizedEmbedding)


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


def tensor_files(folder: Path) -> list[Path]:
    """Return the files with the tensors of a model's adapters, without those of a scaling.

    Args:
        folder: from `adapter_files`.
    """
    files = (folder / name for name in (ADAPTERS, EXTRA_WEIGHTS, PEFT_WEIGHTS))
    return [file for file in files if file.is_file()]


def start_weights(given: Path, model: nn.Module) -> dict[str, mx.array]:
    """Return adapters to start training from, and what was saved beside them, by mlx-lm's names.

    Args:
        given: a folder of adapters, mlx-lm's or PEFT's, or the file of adapters in it.
        model: with new adapters.

    Raises:
        InputError: a file does not load, or PEFT's adapters have another scale than the model's.
    """
    whole = given.is_dir()
    folder = adapter_files(given) if whole else given.parent
    with reading(f"{given} does not load"):
        settings = {}
        if whole or given.name == PEFT_WEIGHTS:
            settings = read_json(adapter_files(folder) / "adapter_config.json")
        if not is_peft(settings):
            beside = (folder / name for name in (ADAPTER_SCALING, EXTRA_WEIGHTS))
            files = [folder / ADAPTERS if whole else given, *filter(Path.is_file, beside)]
            loaded: list[Any] = [mx.load(str(file)) for file in files]
            return {name: array for weights in loaded for name, array in weights.items()}
        peft = read_peft(folder, settings, model)
    modules: dict[str, Any] = dict(model.named_modules())
    for name, scale in peft.scales.items():
        here = getattr(modules[name], "scale", scale)
        if not math.isclose(here, scale):
            raise InputError(
                f"{given} has adapters of scale {scale:g} in {name}, but this run trains some of "
                f"scale {here:g}. Give lora_parameters with that scale in the file of --config."
            )
    return peft.lora | peft.whole


def add_adapters(model: nn.Module, folder: Path, scale: float | None) -> None:
    """Load the adapters in a folder and add them to the model.

    Args:
        model: the base model; it is changed.
        folder: the folder that training wrote, or one of PEFT.
        scale: fixed scale of a scaling that the adapters bring; None follows the length.

    Raises:
        InputError: a file is missing or broken, or the adapters do not fit the model.
    """
    folder = adapter_files(folder)
    with reading(f"The adapters in {folder} cannot be loaded"):
        settings = read_json(folder / "adapter_config.json")
        if is_peft(settings):
            _add_peft(model, read_peft(folder, settings, model), folder / PEFT_WEIGHTS)
        else:
            _add_ours(model, folder, settings, scale)
    model.eval()


def _add_ours(
    model: nn.Module, folder: Path, settings: dict[str, Any], scale: float | None
) -> None:
    for setting, name in (("scaling", ADAPTER_SCALING), ("extra", EXTRA_WEIGHTS)):
        if settings.get(f"trained_{setting}") and not (folder / name).is_file():
            raise InputError(
                f"{folder} lacks {name}, which was trained with its adapters. Copy the whole "
                "folder."
            )
    if settings.get("rope_scaling"):
        # The base model has no scaling of its own; training attached this one.
        attach(
            model,
            settings["rope_scaling"],
            trained_length=settings.get("trained_length"),
            scale=scale,
            own_rope=settings.get("own_rope"),
        )
    _check_type(settings, folder)
    load_adapters(model, str(folder))
    _check_adapters(model, settings, folder / ADAPTERS)
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
        _replace(model, extra, extra_file)


def _add_peft(model: nn.Module, adapters: PeftAdapters, file: Path) -> None:
    modules: dict[str, Any] = dict(model.named_modules())
    embeddings = [name for name, m in modules.items() if isinstance(m, _EMBEDDINGS)]
    changed = {name.rpartition(".")[0] for name in adapters.whole} | adapters.scales.keys()
    for name in changed.intersection(embeddings):
        rows = modules[name].weight.shape[0]
        if not any(isinstance(m, _LINEAR) and len(m.weight) == rows for m in modules.values()):
            raise InputError(
                f"{file} adapts {name}, which is the output head of this model too. Merge the "
                "adapters with PEFT first (merge_and_unload)."
            )
    _replace(model, adapters.whole, file)
    adapted = []
    for name, scale in adapters.scales.items():
        module = modules[name]
        if isinstance(module, _LINEAR):
            kind: Any = DoRALinear if adapters.dora else LoRALinear
        elif isinstance(module, _EMBEDDINGS) and not adapters.dora:
            kind = LoRAEmbedding
        else:
            raise InputError(
                f"{file} adapts {name}, a {type(module).__name__}, which is not read. Merge the "
                "adapters with PEFT first (merge_and_unload)."
            )
        adapted.append((name, kind.from_base(module, r=adapters.ranks[name], scale=scale)))
    model.update_modules(tree_unflatten(adapted))
    _replace(model, adapters.lora, file)


def _replace(model: nn.Module, weights: dict[str, mx.array], file: Path) -> None:
    """Replace tensors of a model by those of a file, which must have their names and shapes."""
    known: Any = dict(tree_flatten(model.parameters()))
    for name, array in weights.items():
        if name not in known or known[name].shape != array.shape:
            raise InputError(
                f"{file} has the tensor {name}, shape {tuple(array.shape)}, which this model "
                "lacks. Give the model that the adapters were trained on."
            )
    model.load_weights(list(weights.items()), strict=False)


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
