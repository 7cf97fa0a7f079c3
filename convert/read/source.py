"""A checkpoint folder as a source: which of its files are read.

The weight files are safetensors before .bin, whatever index lies beside them. Python files
are never read or copied. Not covered: what is inside the weight files.
"""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_clex.checkpoint.files import read_json
from mlx_clex.checkpoint.folder import files_of
from mlx_clex.errors import InputError

CONFIG_FILES = ("config.json", "generation_config.json", "README.md")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "*.tiktoken",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

    folder: Path
    kind: str  # "safetensors", "bin" or "gguf"
    files: list[Path]  # weights, in the order of the shards
    repo: str | None = None  # hub id, where it came from there
    config: dict[str, Any] = field(default_factory=dict)  # config.json as it stands

    @property
    def name(self) -> str:
        """What to call it in a model card."""
        if self.repo:
            return self.repo
        return self.files[0].stem if self.kind == "gguf" else self.folder.resolve().name


def choose_weights(
    names: Iterable[str], read_index: Callable[[str], Any], place: str
) -> tuple[str, list[str]]:
    """Pick the weight files among a checkpoint's files.

    Args:
        names: files at the top of the checkpoint.
        read_index: gives the parsed content of an index file, by its name.
        place: what to call the checkpoint in an error.

    Returns:
        Their kind and names.

    Raises:
        InputError: there are none, or a shard that an index names is missing.
    """
    names = sorted(names)
    for kind, stem, suffix in (
        ("safetensors", "model", "safetensors"),
        ("bin", "pytorch_model", "bin"),
    ):
        present = fnmatch.filter(names, f"{stem}*.{suffix}")
        index = f"{stem}.{suffix}.index.json"
        if index in names:
            shards = _shards(read_index(index), index, place)
            absent = [shard for shard in shards if shard not in present]
            if not absent:
                return kind, shards
            # An index without any of its shards is left over from another format.
            if len(absent) < len(shards):
                raise InputError(
                    f"{place} lacks {', '.join(absent)}, which {index} names. Download or "
                    "copy it again."
                )
        whole = f"{stem}.{suffix}"
        if whole in present:
            return kind, [whole]
        if present:
            return kind, _complete(present, place)
    ggufs = fnmatch.filter(names, "*.gguf")
    if len(ggufs) == 1:
        return "gguf", ggufs
    if ggufs:
        raise InputError(
            f"{place} has several .gguf files ({', '.join(ggufs)}): give the path of one."
        )
    raise InputError(
        f"{place} has no weights: no model*.safetensors, pytorch_model*.bin or .gguf file."
    )


def read_folder(folder: Path, repo: str | None = None) -> Checkpoint:
    """Choose the weight files of a folder and read its config.json.

    Args:
        folder: the checkpoint.
        repo: hub id it came from.

    Raises:
        InputError: it has no weights or no config.json, or lacks a shard.
    """
    names = [file.name for file in files_of(folder)]
    if not names:
        raise InputError(f"The folder {folder} is empty: there is no checkpoint in it.")
    kind, chosen = choose_weights(names, lambda n: read_json(folder / n), str(folder))
    files = [folder / name for name in chosen]
    if kind == "gguf":
        return Checkpoint(folder, kind, files, repo)
    if "config.json" not in names:
        raise InputError(f"{folder} has weights but no config.json, which describes the model.")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} holds no object of settings.")
    if "model_type" not in config:
        raise InputError(f"{folder / 'config.json'} has no model_type, such as llama.")
    return Checkpoint(folder, kind, files, repo, config)


def _shards(index: Any, name: str, place: str) -> list[str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{place}: {name} has no weight_map.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:  # a path out of the folder
            raise InputError(f"{place}: {name} names the shard {shard!r}, which is no file name.")
    return shards


def _complete(present: list[str], place: str) -> list[str]:
    """Shards without an index: their own numbers tell whether one is missing."""
    numbers = [re.search(r"-(\d+)-of-(\d+)\.", name) for name in present]
    if all(numbers):
        total = int(numbers[0][2])  # type: ignore[index]
        there = {int(match[1]) for match in numbers if match}
        # No set of all of them: a hostile name can count to any number.
        absent = next(number for number in itertools.count(1) if number not in there)
        if absent <= total:
            raise InputError(f"{place} lacks shard {absent} of {total}. Download or copy it again.")
    return present
