"""Start from an earlier run: its folder, its last save, its adapters.

Not covered: what a save holds (`saves.py`), and restoring it (`loop.py`).
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.adapters import (
    ADAPTER_SCALING,
    ADAPTERS,
    EXTRA_WEIGHTS,
    read_adapters,
    start_weights,
    tensor_files,
)
from ..checkpoint.digest import digest_of, samples_by_name, weights_digest
from ..checkpoint.files import expand
from ..checkpoint.folder import read_config
from ..checkpoint.peft_adapters import is_peft
from ..checkpoint.safetensors_file import read_header
from ..data.corpus import Corpus
from ..errors import InputError, say, shown
from ..loading import resolve
from ..scaling import PREFIX, Scaling
from .loop import Run
from .options import TrainingOptions
from .saves import Checkpoints


def open_folder(options: TrainingOptions) -> Checkpoints:
    """Open the folder of the run, and refuse one that another run or program uses.

    Raises:
        InputError: the message says what is in it.
    """
    checkpoints = Checkpoints(expand(options.adapter_path), keep=options.keep)
    if checkpoints.newest is not None and not options.resume:
        raise InputError(
            f"{options.adapter_path} holds a run already: go on with --resume, or give another "
            "--adapter-path."
        )
    if checkpoints.newest is not None and options.fine_tune_type == "scaling":
        below = read_adapters(checkpoints.newest)[1].get("resume_adapter_file")
        if below and not options.resume_adapter_file:
            raise InputError(
                f"{options.adapter_path} trains a scaling on top of adapters: go on with "
                f"--resume-adapter-file {below}, as it was started."
            )
    stock = checkpoints.folder / ADAPTERS
    if stock.is_file() and not stock.is_symlink():
        raise InputError(
            f"{stock} is of another program, mlx_lm.lora perhaps, and would be replaced: give "
            "another --adapter-path."
        )
    return checkpoints


def load_adapters(model: Any, given: Path, options: TrainingOptions) -> None:
    """Start from adapters, and from what was saved beside them.

    Args:
        model: with its trained parameters unfrozen.
        given: `--resume-adapter-file`.
        options: of this run.

    Raises:
        InputError: a file does not load, or does not fit what this run trains.
    """
    weights, settings = start_weights(given, model)
    _check_adapted(settings, given, options)
    before = {**(settings.get("rope_scaling") or {})}
    if settings.get("trained_length"):
        before["trained_length"] = settings["trained_length"]
    now = model.scaling.entry() | {"trained_length": model.scaling.trained_length}
    if differing := _different(before, now):
        say(f"The adapters in {given} were trained with another scaling: {differing}.")
    trained: Any = tree_flatten(model.trainable_parameters())
    shapes = {name: value.shape for name, value in trained + _scaling_tensors(model)}
    for name, value in sorted(weights.items()):
        if shapes.get(name) != value.shape:
            here = f"trains as {shapes[name]}" if name in shapes else "does not train"
            raise InputError(
                f"--resume-adapter-file {given} has {name} as {value.shape}, which this run "
                f"{here}: give the options that it was made with."
            )
    model.load_weights(list(weights.items()), strict=False)


def _check_adapted(settings: dict[str, Any], given: Path, options: TrainingOptions) -> None:
    """Refuse adapters that would be another model in this run."""
    adapters = ("lora", "dora")
    kind, scale = settings.get("fine_tune_type", "lora"), options.lora_parameters.get("scale")
    if not settings or kind not in adapters or options.fine_tune_type not in adapters:
        return  # other tensors, which are compared by name
    was = settings["lora_parameters"]["scale"]
    if kind != options.fine_tune_type or was != scale:
        raise InputError(
            f"--resume-adapter-file {given} has {kind} adapters of scale {was:g}, but this run "
            f"trains {options.fine_tune_type} adapters of scale {scale:g}: give the same "
            "--fine-tune-type, and lora_parameters with that scale in the file of --config."
        )


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the settings that differ, as text; "" if none does.

    Args:
        before: what adapters were trained with.
        now: what this run has or asks for; settings that only one of the two has are left out.
    """
    common = [key for key in now if key in before and before[key] != now[key]]
    return ", ".join(f"{key} was {shown(before[key])} and is {shown(now[key])}" for key in common)


def untrained_scaling(model: Any, folder: Path) -> frozenset[str]:
    """Return names of the scaling's tensors that are saved in a folder and not trained."""
    file = folder / ADAPTER_SCALING
    saved = read_header(file).keys() if file.is_file() else ()
    trained: Any = dict(tree_flatten(model.trainable_parameters()))
    return frozenset(
        name for name, _ in _scaling_tensors(model) if name in saved and name not in trained
    )


def _scaling_tensors(model: Any) -> list[tuple[str, Any]]:
    every: Any = tree_flatten(model.parameters())
    return [(name, value) for name, value in every if name.startswith(PREFIX)]


def adapters_below(options: TrainingOptions) -> Path | None:
    """Return the folder of the adapters that stay as they are while a scaling is trained on them.

    Raises:
        InputError: it holds PEFT's adapters, which a save cannot hold.
    """
    if not (options.train and options.fine_tune_type == "scaling" and options.resume_adapter_file):
        return None
    given = expand(options.resume_adapter_file)
    folder, settings = read_adapters(given if given.is_dir() else given.parent)
    if is_peft(settings):
        raise InputError(
            f"--fine-tune-type scaling cannot keep the PEFT adapters in {given}: merge them with "
            "mlx_clex fuse first, and give the result as --model."
        )
    return folder


def check_scaling_below(
    options: TrainingOptions, entry: dict[str, Any] | None, scaling: Scaling, below: Path
) -> None:
    """Refuse to train another scaling than that of the adapters below."""
    here = scaling.entry() | {
        "trained_length": scaling.trained_length,
        "own_rope": read_adapters(below)[1].get("own_rope") or "keep",
    }
    asked = {"trained_length": options.trained_length, "own_rope": options.own_rope}
    asked = {key: value for key, value in asked.items() if value is not None} | (entry or {})
    if differing := _different(here, asked):
        raise InputError(
            f"--resume-adapter-file {options.resume_adapter_file} has a scaling, which this run "
            f"trains: {differing}. Leave these options out."
        )


def names_of_adapters(folder: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of saved weights other than the scaling's, and of norms and embeddings.

    Args:
        folder: from `adapters_below`.
    """
    names = {file.name: frozenset(read_header(file)) for file in tensor_files(folder)}
    return frozenset().union(*names.values()), names.get(EXTRA_WEIGHTS, frozenset())


def settings_to_keep(
    options: TrainingOptions,
    entry: dict[str, Any] | None,
    corpora: Mapping[str, Corpus],
    below: Path | None,
) -> dict[str, Any]:
    """What a resumed run must have in common with the one before.

    Args:
        options: with the lengths that are used.
        entry: rope_scaling of a scaling that was switched on.
        corpora: the parts of the data by name.
        below: the folder of adapters under the scaling that is trained.
    """
    scaling = {"scaling" if key == "type" else key: value for key, value in (entry or {}).items()}
    assert options.model is not None
    folder = resolve(options.model)
    config = json.dumps(read_config(folder), sort_keys=True)
    digest = hashlib.sha256(f"{config} {weights_digest(folder)}".encode())
    same = options.lasting() | scaling | {"the model": digest.hexdigest()[:16]}
    same["the training data"] = _digest_of_tokens(corpora["train"])
    if options.keep_best:  # losses of other tokens cannot be compared
        same["the validation data"] = _digest_of_tokens(corpora["valid"])
    if below is not None:
        tensors = samples_by_name({file: read_header(file) for file in tensor_files(below)})
        same["the adapters below"] = digest_of(tensors[name] for name in sorted(tensors))
    return same


def _digest_of_tokens(corpus: Corpus) -> str:
    ends = np.concatenate([corpus.tokens[: 1 << 20], corpus.tokens[-(1 << 20) :]])
    return f"{len(corpus.tokens)} tokens, {zlib.crc32(ends.tobytes()):08x}"


def go_on(options: TrainingOptions, training: Run, same: dict[str, Any]) -> bool:
    """Go back to the last save; return whether there is something left to do."""
    if not options.resume:
        return True
    if not training.resume(same):
        say(f"{options.adapter_path} has no save yet; starting at iteration 0.")
        return True
    iteration = training.progress.iteration
    if iteration >= options.iters:
        say(f"{options.adapter_path} has all {iteration} iterations already.")
        return False
    say(f"Going on after iteration {iteration}.")
    return True
