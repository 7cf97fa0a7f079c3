"""Load the tasks of lm-evaluation-harness and their documents.

This module needs the extra `evaluate`.

Not covered: the model and the scores (`harness.py`).
"""

import contextlib
import difflib
import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from ..errors import InputError

_LOCAL = ("json", "csv", "parquet", "text", "arrow")  # formats that `datasets` reads from files


@dataclass(frozen=True)
class Tasks:
    """The tasks that one name on the command line stands for."""

    objects: list[Any]  # what the harness is given: tasks, or one group
    tasks: Mapping[str, Any]  # the single tasks, by name
    manager: TaskManager

    def documents(self, limit: int | None) -> dict[str, dict[str, list[int]]]:
        """Return the indices of the documents to use, by task and by document length.

        RULER keeps the documents of all lengths in one list, so `limit` applies to each length.
        Tasks without lengths have the single key "".
        """
        chosen: dict[str, dict[str, list[int]]] = {}
        for name, task in self.tasks.items():
            docs = task.eval_docs
            made = "max_length" in getattr(docs, "features", ())
            lengths = docs["max_length"] if made else [""] * len(docs)
            chosen[name] = defaultdict(list)
            for index, length in enumerate(lengths):
                if limit is None or len(chosen[name][str(length)]) < limit:
                    chosen[name][str(length)].append(index)
        return chosen


def load_tasks(
    names: Sequence[str], metadata: Mapping[str, Any], include_path: Path | None = None
) -> dict[str, Tasks]:
    """Load tasks and their documents.

    Args:
        names: names of tasks, groups or tags.
        metadata: passed to tasks that generate their documents.
        include_path: a folder with more task files.

    Raises:
        InputError: a name is unknown, or a package or dataset is missing.
    """
    # Its warnings about metadata name options of lm_eval's own command.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(
        include_path=include_path, include_defaults=False, metadata=dict(metadata)
    )
    if not set(names) <= set(manager.all_subtasks):
        # The harness's own 14,000 task files take a while to index.
        manager = TaskManager(include_path=include_path, metadata=dict(metadata))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Do you mean {' or '.join(near)}?" if near else "--include-path adds your own."
            raise InputError(f"There is no task {name!r}. {_broken_file(include_path) or hint}")
    found = {}
    for name in names:
        # Random documents must not depend on which tasks were loaded before.
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        with _failures(name):
            loaded: Any = manager.load([name])
        group = loaded["groups"].get(name)
        objects = [group] if group else list(loaded["tasks"].values())
        found[name] = Tasks(objects, loaded["tasks"], manager)
    return found


@contextlib.contextmanager
def _failures(name: str) -> Iterator[None]:
    """Turn the exceptions of loading a task into InputErrors of one line."""
    real = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return real(path, *args, **kwargs)
        except Exception as error:
            if path in _LOCAL:
                files = kwargs.get("data_files") or args
                raise InputError(
                    f"{name}: its data {files} cannot be read: {first_line(_root(error))}."
                ) from error
            # `datasets` and the hub client raise many types; each means that there is no data.
            given = [repr(value) for value in (path, *args, kwargs.get("name")) if value]
            raise InputError(
                f"{name} needs the dataset {path}, which was not found: {first_line(error)}. On a "
                f"machine with network access run datasets.load_dataset({', '.join(given)}), then "
                f"copy its cache to {datasets.config.HF_DATASETS_CACHE}."
            ) from error

    datasets.load_dataset = load_dataset
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{name} needs a package that is missing: {first_line(error)}") from error
    except LookupError as error:
        if "nltk" not in str(error):
            raise InputError(f"{name} does not load: it lacks {error}") from error
        raise InputError(
            f"{name} needs NLTK's punkt_tab, which was not found. On a machine with network "
            "access run python -m nltk.downloader punkt_tab, then copy the folder nltk_data to "
            "your home folder."
        ) from error
    except (AssertionError, ValueError, OSError) as error:
        raise InputError(f"{name} does not load: {first_line(error)}") from error
    finally:
        datasets.load_dataset = real


def _broken_file(folder: Path | None) -> str | None:
    """Return an error text for the first task file that is not YAML, or None."""
    for file in sorted(folder.rglob("*.yaml")) if folder else ():
        if file.name.startswith("."):  # macOS writes ._NAME beside files on other file systems
            continue
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            return f"{file} is not valid YAML: {' '.join(str(error).split())}."
    return None


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
