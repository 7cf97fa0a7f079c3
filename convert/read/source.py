"""Choose which files of a checkpoint folder are read.

safetensors files are preferred to .bin files, whichever index is present. Python files are never
read or copied.

Not covered: the content of the weight files.
"""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_clex.checkpoint.files import read_json
from mlx_clex.checkpoint.folder import files_of, read_config
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
    repo: str | None = None  # hub id, where it came from the hub
    config: dict[str, Any] = field(default_factory=dict)  # config.json, unchanged

    @property
    def name(self) -> str:
        """The name of the checkpoint in a model card."""
        if self.repo:
            return self.repo
        return self.files[0].stem if self.kind == "gguf" else self.folder.resolve().name


def choose_weights(
    names: Iterable[str], read_index: Callable[[str], Any], place: str
) -> tuple[str, list[str]]:
    """Return the weight files among the files of a checkpoint.

    Args:
        names: files at the top of the checkpoint.
        read_index: returns the parsed content of an index file, given its name.
        place: name of the checkpoint in an error.

    Returns:
        Kind and names of the weight files.

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
            # An index with none of its shards is left over from another format.
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
    """Return the checkpoint in a folder: its weight files and config.json.

    Args:
        folder: the checkpoint.
        repo: hub id of the checkpoint.

    Raises:
        InputError: it has no weights or no config.json, or lacks a shard.
    """
    names = [file.name for file in files_of(folder)]
    if not names:
        raise InputError(f"The folder {folder} is empty: it has no checkpoint.")
    kind, chosen = choose_weights(names, lambda n: read_json(folder / n), str(folder))
    files = [folder / name for name in chosen]
    if kind == "gguf":
        return Checkpoint(folder, kind, files, repo)
    if "config.json" not in names:
        raise InputError(f"{folder} has weights but no config.json, which describes the model.")
    config = read_config(folder)
    if "model_type" not in config:
        raise InputError(f"{folder / 'config.json'} has no model_type, such as llama.")
    return Checkpoint(folder, kind, files, repo, config)


def _shards(index: Any, name: str, place: str) -> list[str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{place}: {name} has no weight_map.")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{place}: {name} has a weight_map of other values than file names.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard:  # a path out of the folder
            raise InputError(f"{place}: {name} names the shard {shard!r}, which is no file name.")
    return shards


def _complete(present: list[str], place: str) -> list[str]:
    """Return shards that have no index; refuse them if their numbers show a gap."""
    numbers = [re.search(r"-(\d+)-of-(\d+)\.", name) for name in present]
    if all(numbers):
        total = int(numbers[0][2])  # type: ignore[index]
        there = {int(match[1]) for match in numbers if match}
        # Not a set of all numbers: a hostile file name can have any total.
        absent = next(number for number in itertools.count(1) if number not in there)
        if absent <= total:
            raise InputError(f"{place} lacks shard {absent} of {total}. Download or copy it again.")
    return present
