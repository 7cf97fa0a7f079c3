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

from ..checkpoint.adapters import ADAPTER_SCALING, ADAPTERS, EXTRA_WEIGHTS
from ..checkpoint.digest import weights_digest
from ..checkpoint.folder import read_config
from ..checkpoint.safetensors_file import read_header, read_tensors
from ..data.corpus import Corpus
from ..errors import InputError, reading, say
from ..loading import resolve
from .loop import Run
from .options import TrainingOptions
from .saves import Checkpoints


def open_folder(options: TrainingOptions) -> Checkpoints:
    """Open the folder of the run, and refuse one that another run or program uses.

    Raises:
        InputError: the message says what is in it.
    """
    checkpoints = Checkpoints(Path(options.adapter_path).expanduser(), keep=options.keep)
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


def load_adapters(model: Any, file: Path) -> None:
    """Start from adapters, and from what was saved beside them.

    Args:
        model: with its trained parameters unfrozen.
        file: `--resume-adapter-file`.

    Raises:
        InputError: a file does not load, or does not fit what this run trains.
    """
    files = [file, *(file.with_name(name) for name in (ADAPTER_SCALING, EXTRA_WEIGHTS))]
    for part in files[:1] + [other for other in files[1:] if other.is_file()]:
        with reading(f"--resume-adapter-file {part} does not load"):
            weights, _ = read_tensors(part)
        trained: Any = tree_flatten(model.trainable_parameters())
        shapes = {name: value.shape for name, value in trained}
        for name, value in sorted(weights.items()):
            if shapes.get(name) != value.shape:
                here = f"trains as {shapes[name]}" if name in shapes else "does not train"
                raise InputError(
                    f"--resume-adapter-file {part} has {name} as {value.shape}, which this run "
                    f"{here}: give the options that it was made with."
                )
        model.load_weights(list(weights.items()), strict=False)


def names_of_adapters(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of saved weights other than the scaling's, and of norms and embeddings.

    Args:
        file: `--resume-adapter-file`, already loaded.
    """
    adapters = read_header(file)
    beside = file.with_name(EXTRA_WEIGHTS)
    extra = read_header(beside) if beside.is_file() else {}
    return frozenset(adapters) | frozenset(extra), frozenset(extra)


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
