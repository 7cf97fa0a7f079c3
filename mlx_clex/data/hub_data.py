"""Load datasets of the Hugging Face hub for training.

mlx-lm's code loads them, as for its `--data OWNER/NAME` and `hf_dataset:`. This module adds a
fingerprint of their content and errors of one line. Rows stay on disk until they are read.

Not covered: caching the tokens (`corpus.py`).
"""

import copy
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from mlx_lm.tuner.datasets import ConcatenatedDataset, load_custom_hf_dataset, load_hf_dataset

from ..errors import InputError, reading

Entries = Mapping[str, Any] | Sequence[Mapping[str, Any]]  # the YAML key hf_dataset


def is_hub_id(path: Path) -> bool:
    """Return whether a path is not on this machine and has the form OWNER/NAME."""
    name = path.as_posix()
    if path.exists() or name.count("/") != 1 or path.suffix in (".txt", ".md", ".jsonl"):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_hub_data(
    source: str | Entries, tokenizer: Any, columns: Mapping[str, Any], *, splits: Sequence[str]
) -> dict[str, Any]:
    """Return mlx-lm's datasets by split, without splits that the source lacks.

    Args:
        source: OWNER/NAME, or the value of the YAML key hf_dataset.
        tokenizer: mlx-lm's wrapper.
        columns: mlx-lm's settings: mask_prompt, and the columns of OWNER/NAME.
        splits: names from train, valid and test.

    Raises:
        InputError: the dataset is not found or cannot be used.
    """
    options = Namespace(
        **columns,
        train="train" in splits or "valid" in splits,
        test="test" in splits,
        hf_dataset=None if isinstance(source, str) else _checked(source, splits),
    )
    name = name_of(source)
    rows = "Rows need text, or messages, or prompt and completion. Check the name and the columns"
    here = f"There is no folder {name} here, and the" if isinstance(source, str) else "The"
    with reading(f"{here} dataset {name} cannot be used. {rows}"):
        try:
            if isinstance(source, str):
                loaded = load_hf_dataset(source, tokenizer, options)
            else:
                loaded = load_custom_hf_dataset(options, tokenizer)
        except ImportError as error:
            raise InputError(
                f"{name} is a dataset of the hub, which needs the package datasets ({error}). Run "
                "pip install datasets."
            ) from error
    found = dict(zip(("train", "valid", "test"), loaded, strict=True))
    return {split: rows for split, rows in found.items() if split in splits and len(rows)}


def name_of(source: str | Entries) -> str:
    """Return the name of a source for messages."""
    if isinstance(source, str):
        return source
    entries = [source] if isinstance(source, Mapping) else source
    return " + ".join(str(entry["path"]) for entry in entries)


def fingerprint_of(rows: Any) -> str:
    """Return a text that changes with the rows and with the columns that are read."""
    if isinstance(rows, ConcatenatedDataset):
        return "+".join(fingerprint_of(part) for part in rows._data)
    columns = {key: value for key, value in vars(rows).items() if isinstance(value, str)}
    # `datasets` derives it from a table's files and operations.
    return f"{type(rows).__name__} {columns} {rows._data._fingerprint}"


def documents(name: str, rows: Any) -> Iterator[tuple[list[int], int]]:
    """Yield (ids, length of the prompt) of each row."""
    for index in range(len(rows)):
        with reading(f"{name}, row {index}, cannot be used"):
            ids, prompt = checked_ids(*rows.process(rows[index]))
        yield ids, prompt


def checked_ids(ids: Any, prompt: int) -> tuple[list[int], int]:
    """Return the ids of one text and the length of its prompt.

    Raises:
        TypeError: a row had a list of texts, of which a tokenizer makes lists of ids.
    """
    if not all(type(token) is int for token in ids):
        raise TypeError("its text is not one text")
    return list(ids), prompt


def _checked(source: Any, splits: Sequence[str]) -> list[dict[str, Any]]:
    entries = [source] if isinstance(source, Mapping) else source
    if not isinstance(entries, list) or not entries:
        raise InputError("hf_dataset must be a mapping with `path: NAME`, or a list of mappings.")
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise InputError(f"hf_dataset: each entry needs `path: NAME`, got {entry!r}.")
        if "test" in splits and not entry.get("test_split"):
            raise InputError(f"hf_dataset: --test needs the key test_split for {entry['path']}.")
    return copy.deepcopy(entries)
