"""Find adapters in a folder, check them and add them to a model.

The folder has mlx-lm's files and up to two more: the trained tensors of the scaling, and the
trained norms and embeddings. Or it is one of PEFT (`peft_adapters.py`).

Not covered: writing adapters (`training/saves.py`).
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import load_adapters

from ..errors import InputError, reading, shown
from ..model.scaled_model import ScaledModel, attach
from .digest import weights_digest
from .files import check_link, expand, read_json
from .folder import files_of
from .peft_adapters import PEFT_WEIGHTS, PeftAdapters, is_peft, read_peft
from .safetensors_file import read_header, read_tensors

ADAPTERS = "adapters.safetensors"
CONFIG = "adapter_config.json"
ADAPTER_SCALING = "scaling.safetensors"  # the scaling's tensors, where they were trained
EXTRA_WEIGHTS = "norms_embeddings.safetensors"  # norms and embeddings, likewise
_TYPES = ("lora", "dora", "full", "scaling")  # fine_tune_type of adapter_config.json
_LEAVES = ("lora_a", "lora_b", "m")  # tensors of an adapted layer; m only in DoRA's
CURRENT = "current"  # a link to the newest save
_MOST_LAYERS, _MOST_RANK = 10_000, 1 << 16
_LINEAR, _EMBEDDINGS = (nn.Linear, nn.QuantizedLinear), (nn.Embedding, nn.QuantizedEmbedding)


def read_adapters(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the newest save, and its adapter_config.json.

    Args:
        folder: as the user gave it.

    Raises:
        InputError: a file is missing, leads out of the folder, or is not usable.
    """
    folder = expand(folder)
    check_link(folder / CURRENT, folder)
    # Resolved once, so that all files come from one save while training writes the next.
    folder = (folder / CURRENT).resolve() if (folder / CURRENT).is_dir() else folder
    if not os.path.lexists(folder / CONFIG):
        raise InputError(f"{folder} has no {CONFIG}. Give the folder that training wrote.")
    files = {file.name for file in files_of(folder)}
    settings = read_json(folder / CONFIG)
    if not isinstance(settings, dict):
        raise InputError(f"{folder / CONFIG} is not a JSON object. Copy it again.")
    if is_peft(settings):
        return folder, settings
    needed = [ADAPTERS]
    needed += [ADAPTER_SCALING] if settings.get("trained_scaling") else []
    needed += [EXTRA_WEIGHTS] if settings.get("trained_extra") else []
    for name in needed:
        if name not in files:
            raise InputError(f"{folder} lacks {name}. Copy the whole folder that training wrote.")
    _check_settings(settings, folder)
    return folder, settings


def _check_settings(settings: dict[str, Any], folder: Path) -> None:
    """Refuse settings from which mlx-lm would make other layers than the file's, or none."""
    kind = settings.get("fine_tune_type", "lora")
    if kind not in _TYPES:
        raise InputError(
            f"{folder / CONFIG} has fine_tune_type {shown(kind)}; there is: {', '.join(_TYPES)}."
        )
    layers = settings.get("num_layers")
    if type(layers) is not int or not -1 <= layers <= _MOST_LAYERS:
        raise InputError(
            f"{folder / CONFIG} has num_layers {shown(layers)}; it must be a whole number within "
            f"1..{_MOST_LAYERS}, or -1 for all."
        )
    entry = settings.get("rope_scaling")
    if entry is not None and not isinstance(entry, dict):
        raise InputError(
            f"{folder / CONFIG} has rope_scaling {shown(entry)}; it must be an object or null."
        )
    if kind == "full":
        return
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise InputError(f"{folder / CONFIG} has no object lora_parameters. Copy it again.")
    check_lora(parameters, _MOST_RANK, str(folder / CONFIG))
    rank = parameters["rank"]
    header = read_header(folder / ADAPTERS)
    for name, info in header.items():
        if name.endswith((".lora_a", ".lora_b")) and rank not in info.shape:
            raise InputError(
                f"{folder / CONFIG} has rank {rank}, but {name} has the shape {info.shape}. Copy "
                "the whole folder that training wrote."
            )


def check_lora(parameters: Mapping[str, Any], most: int, where: str) -> None:
    """Refuse a rank beyond a bound, and values of the wrong type.

    Args:
        parameters: the lora_parameters of mlx-lm.
        most: the largest rank.
        where: start of the message, where they stand.

    Raises:
        InputError: the message has the value and the range.
    """
    for name, low, high in (("rank", 1, most), ("scale", -1e6, 1e6), ("dropout", 0, 1)):
        value: Any = parameters.get(name)
        kinds = (int,) if name == "rank" else (int, float)
        if type(value) not in kinds or not low <= value <= high:
            raise InputError(
                f"{where} must have a {name} within {low:g}..{high:g}, got {shown(value)}."
            )
    keys = parameters.get("keys") or []
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{where} must have a list of names as keys, got {shown(keys)}.")


def tensor_files(folder: Path) -> list[Path]:
    """Return the files with the tensors of a model's adapters, without those of a scaling.

    Args:
        folder: from `read_adapters`.
    """
    files = (folder / name for name in (ADAPTERS, EXTRA_WEIGHTS, PEFT_WEIGHTS))
    return [file for file in files if file.is_file()]


def start_weights(given: Path, model: nn.Module) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return adapters to start training from, and what was saved beside them, by mlx-lm's names.

    Args:
        given: a folder of adapters, mlx-lm's or PEFT's, or the file of adapters in it.
        model: with new adapters.

    Returns:
        The tensors, and the settings of an adapter_config.json of mlx-lm's; {} without one.

    Raises:
        InputError: a file does not load, or PEFT's adapters have another scale than the model's.
    """
    whole = given.is_dir()
    folder: Path = given.parent
    settings: dict[str, Any] = {}
    if whole or given.name == PEFT_WEIGHTS or (folder / CONFIG).is_file():
        folder, settings = read_adapters(given if whole else folder)
    with reading(f"--resume-adapter-file {given} does not load"):
        if not is_peft(settings):
            _check_extra(folder / EXTRA_WEIGHTS, settings)
            beside = (folder / name for name in (ADAPTER_SCALING, EXTRA_WEIGHTS))
            files = [folder / ADAPTERS if whole else given, *filter(Path.is_file, beside)]
            tensors = (read_tensors(file)[0] for file in files)
            return {name: t for part in tensors for name, t in part.items()}, settings
        peft = read_peft(folder, settings, model)
    modules: dict[str, Any] = dict(model.named_modules())
    for name, scale in peft.scales.items():
        here = getattr(modules[name], "scale", scale)
        if not math.isclose(here, scale):
            raise InputError(
                f"{given} has adapters of scale {scale:g} in {name}, but this run trains some of "
                f"scale {here:g}. Give lora_parameters with that scale in the file of --config."
            )
    return peft.lora | peft.whole, {}


def add_adapters(model: nn.Module, folder: str | Path, scale: float | None) -> None:
    """Load the adapters in a folder and add them to the model.

    Args:
        model: the base model; it is changed.
        folder: the folder that training wrote, or one of PEFT.
        scale: fixed scale of a scaling that the adapters bring; None follows the length.

    Raises:
        InputError: a file is missing or broken, or the adapters do not fit the model.
    """
    folder, settings = read_adapters(folder)
    with reading(f"The adapters in {folder} cannot be loaded"):
        if is_peft(settings):
            _add_peft(model, read_peft(folder, settings, model), folder / PEFT_WEIGHTS)
        else:
            _add_ours(model, folder, settings, scale)
    model.eval()


def _add_ours(
    model: nn.Module, folder: Path, settings: dict[str, Any], scale: float | None
) -> None:
    if settings.get("rope_scaling"):
        # The base model has no scaling of its own; training attached this one.
        attach(
            model,
            settings["rope_scaling"],
            trained_length=settings.get("trained_length"),
            scale=scale,
            own_rope=settings.get("own_rope"),
        )
    load_adapters(model, str(folder))
    _check_adapters(model, settings, folder / ADAPTERS)
    scaling_file, extra_file = folder / ADAPTER_SCALING, folder / EXTRA_WEIGHTS
    if scaling_file.is_file():
        if not isinstance(model, ScaledModel):
            raise InputError(
                f"{scaling_file} needs a model with a scaling. Give the model that the "
                "adapters were trained on."
            )
        model.scaling.take_weights(read_tensors(scaling_file)[0])
    if extra_file.is_file():
        _check_extra(extra_file, settings)
        _replace(model, read_tensors(extra_file)[0], extra_file)


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


def _check_adapters(model: nn.Module, settings: dict[str, Any], file: Path) -> None:
    """Refuse a file without some of the tensors that its adapter_config.json asks for.

    mlx-lm checks only that the model has every tensor of the file. What the file lacks it
    leaves as it starts: without effect, or of random values.
    """
    given = read_header(file)
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


def _check_extra(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a file of norms and embeddings with other tensors than its adapter_config.json names.

    Older saves have only true or false there.
    """
    names = settings.get("trained_extra")
    if not isinstance(names, list) or not file.is_file():  # `read_adapters` refuses its absence
        return
    given = read_header(file)
    for name in sorted({*names} ^ given.keys()):
        raise InputError(
            f"{file} {'has' if name in given else 'lacks'} {name}, unlike its "
            "adapter_config.json. Copy the whole folder that training wrote."
        )


def other_base(folder: Path, adapters: str | Path) -> str | None:
    """Return a warning if adapters were trained on other weights than the model's, else None.

    Other weights can be intended: adapters trained on a quantised model also fit the
    unquantised one.

    Args:
        folder: the folder of the model.
        adapters: the folder of the adapters.
    """
    _, config = read_adapters(adapters)
    trained_on = config.get("base_weights")
    if trained_on is None or trained_on == weights_digest(folder):
        return None
    return (
        f"The adapters in {adapters} were trained on {config.get('model')}, whose weights differ "
        f"from those of {folder}. They fit only that model and its quantised copies."
    )
