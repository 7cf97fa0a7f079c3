"""Where a checkpoint's files are: a folder, a .gguf file, or the hub.

Chooses the weight files (safetensors before .bin, whatever index lies beside them) and
fetches from the hub only those and the small text files. Python files are never fetched,
read or copied. Not covered: what is inside the weight files.
"""

import fnmatch
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_clex.errors import InputError

CONFIG_FILES = ("config.json", "generation_config.json")
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
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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


def find(hf_path: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint, downloading what is needed of one on the hub.

    Args:
        hf_path: a folder, a .gguf file, or a hub id such as "owner/name".
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: there is no such folder or id, it has no weights or no config.json,
            or a shard that its index names is missing.
    """
    path = Path(hf_path).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"{path} is a file. Give the folder it lies in, a .gguf file, or a hub id."
            )
        return Checkpoint(path.parent, "gguf", [path])
    if is_local(hf_path):
        if revision is not None:
            raise InputError(f"--revision {revision} is for hub ids; {path} is a folder.")
        return _from_folder(path, None)
    repo = check_hub_id(hf_path)
    from .hub import download

    return _from_folder(download(repo, revision), repo)


def is_local(hf_path: str | Path) -> bool:
    """Whether a file or folder of this name is here, which comes before a hub id."""
    # An empty name would be the folder one stands in.
    return str(hf_path) != "" and Path(hf_path).expanduser().exists()


def check_hub_id(hf_path: str | Path) -> str:
    """The hub id, if it can be one.

    Raises:
        InputError: it cannot.
    """
    if str(hf_path).endswith(".gguf"):
        raise InputError(f"There is no file {hf_path}.")
    if not _REPO_ID.fullmatch(str(hf_path)):
        raise InputError(
            f"There is no folder {Path(hf_path)}, and it is not a hub id such as owner/name either."
        )
    return str(hf_path)


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


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}.") from error


def _from_folder(folder: Path, repo: str | None) -> Checkpoint:
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
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
