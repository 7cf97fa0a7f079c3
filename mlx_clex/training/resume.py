"""Start from an earlier run: its folder, its last save, its adapters.

Not covered: what a save holds (`saves.py`), and restoring it (`loop.py`).
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.adapters import (
    ADAPTERS,
    EXTRA_WEIGHTS,
    read_adapters,
    start_weights,
    tensor_files,
)
from ..checkpoint.digest import weights_digest
from ..checkpoint.files import expand
from ..checkpoint.folder import read_config
from ..checkpoint.peft_adapters import is_peft
from ..checkpoint.safetensors_file import read_header
from ..data.corpus import Corpus
from ..errors import InputError, say
from ..loading import resolve
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
    stock = checkpoints.folder / ADAPTERS
    if stock.is_file() and not stock.is_symlink():
        raise InputError(
            f"{stock} is of another program, mlx_lm.lora perhaps, and would be replaced: give "
            "another --adapter-path."
        )
    return checkpoints


def load_adapters(model: Any, given: Path) -> None:
    """Start from adapters, and from what was saved beside them.

    Args:
        model: with its trained parameters unfrozen.
        given: `--resume-adapter-file`.

    Raises:
        InputError: a file does not load, or does not fit what this run trains.
    """
    weights = start_weights(given, model)
    trained: Any = tree_flatten(model.trainable_parameters())
    shapes = {name: value.shape for name, value in trained}
    for name, value in sorted(weights.items()):
        if shapes.get(name) != value.shape:
            here = f"trains as {shapes[name]}" if name in shapes else "does not train"
            raise InputError(
                f"--resume-adapter-file {given} has {name} as {value.shape}, which this run "
                f"{here}: give the options that it was made with."
            )
    model.load_weights(list(weights.items()), strict=False)


def adapters_below(given: Path) -> Path:
    """Return the folder of the adapters that stay as they are while a scaling is trained.

    Args:
        given: `--resume-adapter-file`: the folder, or the file of adapters in it.

    Raises:
        InputError: it holds PEFT's adapters, which a save cannot hold.
    """
    folder, settings = read_adapters(given if given.is_dir() else given.parent)
    if is_peft(settings):
        raise InputError(
            f"--fine-tune-type scaling cannot keep the PEFT adapters in {given}: merge them with "
            "mlx_clex fuse first, and give the result as --model."
        )
    return folder


def names_of_adapters(folder: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of saved weights other than the scaling's, and of norms and embeddings.

    Args:
        folder: from `adapters_below`.
    """
    names = {file.name: frozenset(read_header(file)) for file in tensor_files(folder)}
    return frozenset().union(*names.values()), names.get(EXTRA_WEIGHTS, frozenset())


def settings_to_keep(
    options: TrainingOptions, entry: dict[str, Any] | None, corpus: Corpus
) -> dict[str, Any]:
    """What a resumed run must have in common with the one before."""
    scaling = {"scaling" if key == "type" else key: value for key, value in (entry or {}).items()}
    assert options.model is not None
    folder = resolve(options.model)
    config = json.dumps(read_config(folder), sort_keys=True)
    digest = hashlib.sha256(f"{config} {weights_digest(folder)}".encode())
    ends = np.concatenate([corpus.tokens[: 1 << 20], corpus.tokens[-(1 << 20) :]])
    return {
        **options.lasting(),
        **scaling,
        "the model": digest.hexdigest()[:16],
        "the training data": f"{len(corpus.tokens)} tokens, {zlib.crc32(ends.tobytes()):08x}",
    }


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
