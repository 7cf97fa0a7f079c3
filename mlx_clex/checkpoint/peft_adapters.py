"""Read the adapters of a PEFT folder in the names and shapes of mlx-lm.

PEFT names each tensor after the module of transformers' model that it adapts:
`base_model.model.MODULE.lora_A.weight` is (rank, inputs) and `lora_B.weight` (outputs, rank).

Source: PEFT 0.21, tuners/lora/model.py `LoraModel._create_and_replace` (rank and alpha of a
module), tuners/lora/layer.py `LoraLayer.update_layer` (the scale).

Not covered: methods other than LoRA and DoRA, experts, and files of pickled tensors.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, shown
from .safetensors_file import read_tensors

PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LEAVES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
_ADAPTER = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _LEAVES))})")
_WHOLE = re.compile(r"((?:(?!lora_|token_adapter)[^.]+\.)+)(weight|bias)")
# Settings that only training reads, or that the tensors themselves answer.
_UNREAD = (
    "auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform loftq_config "
    "lora_dropout lora_ga_config megatron_core modules_to_save peft_version qalora_group_size "
    "revision runtime_config target_modules task_type"
)
# Settings that the answers depend on.
PEFT_SETTINGS = (
    *("alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type"),
    *("r", "rank_pattern", "use_dora", "use_rslora"),
)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # that leave the base as it is
_ADAPTED = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
# No groups and few repetitions: matching a stranger's pattern must end.
_PATTERN = re.compile(r"(?=(?:[^*+]*[*+]?){0,3}\Z)[\w.^$\\*+-]{1,200}")
# Names for the model around the layers, which differ between transformers and mlx-lm.
_AROUND = {"model", "language_model", "transformer", "gpt_neox"}


@dataclass(frozen=True)
class PeftAdapters:
    """Adapters in the names and shapes of mlx-lm."""

    lora: dict[str, mx.array]  # lora_a (inputs, rank), lora_b (rank, outputs) and DoRA's m
    scales: dict[str, float]  # of each adapted module
    ranks: dict[str, int]
    whole: dict[str, mx.array]  # tensors that replace those of the model
    dora: bool


def is_peft(settings: Mapping[str, Any]) -> bool:
    """Return whether an adapter_config.json was written by PEFT."""
    return "peft_type" in settings


def read_peft(folder: Path, settings: Mapping[str, Any], model: nn.Module) -> PeftAdapters:
    """Return the adapters of a PEFT folder.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        settings: the content of adapter_config.json.
        model: the model that they are for; it gives the names.

    Raises:
        InputError: a method or setting that is not read, a tensor of a module that the model
            lacks, or one of another rank than the settings say.
    """
    _check_settings(settings, folder / "adapter_config.json")
    file = folder / PEFT_WEIGHTS
    if not file.is_file():
        raise InputError(
            f"{folder} has no {PEFT_WEIGHTS}. Save the adapters with safe_serialization=True."
        )
    loaded, _ = read_tensors(file)
    modules = _Modules(model)
    lora: dict[str, mx.array] = {}
    whole: dict[str, mx.array] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for full_name, tensor in sorted(loaded.items()):
        name = full_name.removeprefix(_PREFIX)
        if match := _ADAPTER.fullmatch(name):
            ours, leaf = modules.find(match[1], file), _LEAVES[match[2]]
            lora[f"{ours}.{leaf}"] = tensor.T
            rank, scales[ours] = _rank_and_scale(settings, match[1])
            ranks[ours] = rank
            if leaf != "m" and tensor.shape[leaf == "lora_b"] != rank:
                raise InputError(
                    f"{file} has {full_name} as {tuple(tensor.shape)}, but its adapter_config.json "
                    f"says rank {rank}. Copy the whole folder again."
                )
        elif match := _WHOLE.fullmatch(name.replace(".base_layer.", ".")):
            whole[f"{modules.find(match[1][:-1], file)}.{match[2]}"] = tensor
        else:
            raise InputError(
                f"{file} has the tensor {full_name}, which is not read: there is lora_A, lora_B, "
                "lora_magnitude_vector, weight and bias. Merge the adapters with PEFT first."
            )
    leaves = ("lora_a", "lora_b", *(["m"] if settings.get("use_dora") else []))
    for ours in scales:
        if missing := [leaf for leaf in leaves if f"{ours}.{leaf}" not in lora]:
            raise InputError(f"{file} lacks {missing[0]} of {ours}. Copy the whole folder again.")
    if not scales:
        raise InputError(f"{file} has no lora_A. Give a folder that PEFT saved.")
    for name in sorted(_trained(settings, model)):
        if name not in scales and f"{name}.weight" not in whole:
            raise InputError(
                f"{file} lacks {name}, which its adapter_config.json names as trained. Copy the "
                "whole folder again."
            )
    return PeftAdapters(lora, scales, ranks, whole, dora="m" in leaves)


def _trained(settings: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return the modules that `target_modules` and `modules_to_save` name, by mlx-lm's names.

    A pattern of PEFT in place of names is not matched: a stranger's may never end.

    Source: PEFT 0.21, tuners/tuners_utils.py `check_target_module_exists`.
    """

    def ends(key: str) -> tuple[str, ...]:
        names = settings.get(key)
        names = names if isinstance(names, list) else []
        return tuple(f".{_within(name)}" for name in names if isinstance(name, str) and name)

    targets, saved, left_out = map(ends, ("target_modules", "modules_to_save", "exclude_modules"))
    if isinstance(settings.get("exclude_modules"), str):
        targets = ()
    layers = settings.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    found = []
    for name, module in model.named_modules():
        within = f".{_within(name)}"
        layer = re.search(r"\.(\d+)\.", name)
        there = not layers or (layer is not None and int(layer[1]) in layers)
        adapted = isinstance(module, _ADAPTED) or "lora_a" in module
        if (within.endswith(saved) and "weight" in module) or (
            adapted and there and within.endswith(targets) and not within.endswith(left_out)
        ):
            found.append(name)
    return found


class _Modules:
    """The modules of a model, found by the names that transformers gives them."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[str, list[str]] = {}
        for name, _ in model.named_modules():
            self._names.setdefault(_within(name), []).append(name)
        self._taken: dict[str, str] = {}

    def find(self, name: str, file: Path) -> str:
        """Return mlx-lm's name of a module."""
        found = self._names.get(_within(name), [])
        ours = name if name in found else found[0] if len(found) == 1 else None
        if ours is None or self._taken.setdefault(ours, name) != name:
            raise InputError(
                f"{file} adapts {name}, which mlx-lm's model does not have under that name. Merge "
                "the adapters with PEFT first (merge_and_unload)."
            )
        return ours


def _within(name: str) -> str:
    """Return the name of a module without those of the models around its layers."""
    parts = [part for part in name.split(".") if part not in _AROUND]
    return ".".join("layers" if part == "h" else part for part in parts)


def _check_settings(settings: Mapping[str, Any], file: Path) -> None:
    kind, start = settings["peft_type"], settings.get("init_lora_weights", True)
    if kind != "LORA":
        raise InputError(f"{file} has peft_type {shown(kind)}; only LORA is read.")
    known = {*_UNREAD.split(), *PEFT_SETTINGS}
    odd = {key: value for key, value in settings.items() if value and key not in known}
    if not any(start is each or start == each for each in _STARTS):
        odd = {"init_lora_weights": start}
    for key, value in sorted(odd.items()):
        raise InputError(
            f"{file} has {key} = {shown(value)}, which is not read. Merge the adapters with PEFT "
            "first (merge_and_unload)."
        )
    for key, low in (("r", 1), ("lora_alpha", -1e6)):
        numbers: Iterable[Any] = [settings.get(key)]
        pattern = settings.get("rank_pattern" if key == "r" else "alpha_pattern") or {}
        if not isinstance(pattern, dict) or not all(map(_PATTERN.fullmatch, pattern)):
            raise InputError(
                f"{file} has patterns that are not read: {shown(pattern)}. Give names of modules "
                "and numbers."
            )
        for number in (*numbers, *pattern.values()):
            whole = isinstance(number, int) or (key != "r" and isinstance(number, float))
            if not whole or isinstance(number, bool) or not low <= number <= 1e6:
                raise InputError(
                    f"{file} has {key} = {shown(number)}. It must be a number within {low:g}..1e6."
                )


def _rank_and_scale(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return the rank of a module's adapters and what their product is multiplied by."""

    def of_module(pattern: str, default: str) -> Any:
        found: Mapping[str, Any] = settings.get(pattern) or {}
        keys = (key for key in found if re.match(rf"(.*\.)?({key})$", module))
        return found.get(next(keys, module), settings[default])

    rank = of_module("rank_pattern", "r")
    alpha = of_module("alpha_pattern", "lora_alpha")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
