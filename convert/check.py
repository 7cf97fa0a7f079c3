"""Opens a written checkpoint as loading does, before it gets its name.

Weights are not read: MLX is lazy, and names and shapes are in the files' headers.

Not covered: checkpoints for transformers, of which the tokenizer alone is opened.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_config, save_config

from mlx_clex.checkpoint.tokenizer import open_tokenizer
from mlx_clex.errors import InputError, reading, shown
from mlx_clex.model.scaled_model import scaled
from mlx_clex.model_file import open_model
from mlx_clex.scaling.check import check_frequencies

_DTYPE = re.compile(r"(torch\.)?(auto|(b?float|u?int)\d+\w*)")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse values of the wrong type that mlx-lm and transformers would stumble over.

    Raises:
        InputError: the message names the key.
    """
    tied = config.get("tie_word_embeddings")
    if not isinstance(tied, bool | None):
        raise InputError(
            f"config.json has tie_word_embeddings {shown(tied)}; it must be true or false."
        )
    for key in ("torch_dtype", "dtype"):
        dtype = config.get(key)
        if dtype is not None and not (isinstance(dtype, str) and _DTYPE.fullmatch(dtype)):
            raise InputError(
                f"config.json has {key} {shown(dtype)}; it must be a type of numbers such as "
                '"bfloat16".'
            )


def check_tokenizer(folder: Path, config: dict[str, Any], name: str) -> None:
    """Open the tokenizer of a folder that has neither weights nor config.json yet.

    Args:
        folder: with the tokenizer and generation_config.json.
        config: the config.json to be.
        name: of the source, for messages.

    Raises:
        InputError: it does not load, or is another model's.
    """
    file = folder / "config.json"
    save_config(config, file)  # transformers may take the tokenizer's class from it
    try:
        open_tokenizer(folder, load_config(folder), name=name)
    finally:
        file.unlink()  # it makes a checkpoint of a folder


def check_model(folder: Path) -> None:
    """Open the model of a written folder, without reading its weights.

    Raises:
        InputError: it does not load.
    """
    with reading("The converted checkpoint does not load. Check config.json of the source"):
        model, _ = open_model(folder)
        if (scaling := scaled(model).scaling) is not None:
            check_frequencies(scaling)
