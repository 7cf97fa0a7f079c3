"""Data sets of the Hugging Face hub, for training.

mlx-lm's own code loads them, as its `--data OWNER/NAME` and `hf_dataset:` do; here are only
what identifies their content, and errors of one line. Rows stay on disk until they are read.

Not covered: how tokens are kept (`data.py`).
"""

import copy
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from mlx_lm.tuner.datasets import ConcatenatedDataset, load_custom_hf_dataset, load_hf_dataset

from ..errors import InputError

Entries = Mapping[str, Any] | Sequence[Mapping[str, Any]]  # the YAML key hf_dataset


def is_hub_id(path: Path) -> bool:
    """Whether this is OWNER/NAME, and nothing that is on this machine."""
    name = path.as_posix()
    if path.exists() or name.count("/") != 1 or path.suffix in (".txt", ".md", ".jsonl"):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_hub_data(
    source: str | Entries, tokenizer: Any, *, mask_prompt: bool, splits: Sequence[str]
) -> dict[str, Any]:
    """mlx-lm's data sets by split; those the source does not have are left out.

    Args:
        source: OWNER/NAME, or what the YAML key hf_dataset holds.
        tokenizer: mlx-lm's wrapper.
        mask_prompt: leave prompts out of the loss.
        splits: of train, valid and test.

    Raises:
        InputError: it cannot be had or used; the message has the source.
    """
    options = Namespace(
        mask_prompt=mask_prompt,
        train="train" in splits or "valid" in splits,
        test="test" in splits,
        hf_dataset=None if isinstance(source, str) else _checked(source, splits),
    )
    name = name_of(source)
    try:
        if isinstance(source, str):
            loaded = load_hf_dataset(source, tokenizer, options)
        else:
            loaded = load_custom_hf_dataset(options, tokenizer)
    except ImportError as error:
        raise InputError(
            f"{name} is a data set of the hub, which needs a package: pip install datasets "
            f"({error})."
        ) from error
    except Exception as error:
        # Downloads, formats and scripts fail in ways of their own.
        raise InputError(
            f"The data set {name} cannot be used ({type(error).__name__}: {error}). Is the name "
            "right, and has it rows of text, of messages, or of prompt and completion?"
        ) from error
    found = dict(zip(("train", "valid", "test"), loaded, strict=True))
    return {split: rows for split, rows in found.items() if split in splits and len(rows)}


def name_of(source: str | Entries) -> str:
    """For messages."""
    if isinstance(source, str):
        return source
    entries = [source] if isinstance(source, Mapping) else source
    return " + ".join(str(entry["path"]) for entry in entries)


def fingerprint_of(rows: Any) -> str:
    """Changes with the rows, and with which of their columns are read."""
    if isinstance(rows, ConcatenatedDataset):
        return "+".join(fingerprint_of(part) for part in rows._data)
    columns = {key: value for key, value in vars(rows).items() if isinstance(value, str)}
    # The package names every table by the files and operations it came from.
    return f"{type(rows).__name__} {columns} {rows._data._fingerprint}"


def documents(name: str, rows: Any) -> Iterator[tuple[list[int], int]]:
    """(ids, length of the prompt) of each row."""
    for index in range(len(rows)):
        try:
            ids, prompt = rows.process(rows[index])
        except Exception as error:
            raise InputError(
                f"{name}, row {index}, cannot be used ({type(error).__name__}: {error})."
            ) from error
        yield list(ids), prompt


def _checked(source: Any, splits: Sequence[str]) -> list[dict[str, Any]]:
    entries = [source] if isinstance(source, Mapping) else source
    if not isinstance(entries, list) or not entries:
        raise InputError("hf_dataset must be `path: NAME` and more such lines, or a list of these.")
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise InputError(f"hf_dataset: every entry needs `path: NAME`, got {entry!r}.")
        if "test" in splits and not entry.get("test_split"):
            raise InputError(f"hf_dataset: --test needs a test_split for {entry['path']}.")
    return copy.deepcopy(entries)
