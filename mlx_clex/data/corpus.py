"""Tokenise texts and cache the token ids on disk.

The input is what mlx-lm reads (train.jsonl, valid.jsonl and test.jsonl with text, chat or
completions; datasets of the hub) or a folder of .txt and .md files. The ids of all texts go
into one flat file, which is memory-mapped. The next run with the same files and tokenizer
uses this file.

Not covered: cutting tokens into batches (`training/batches.py`).
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from mlx_lm.tuner.datasets import create_dataset

from ..checkpoint.digest import digest_of
from ..checkpoint.files import check_link, new_folder, open_regular
from ..checkpoint.lock import locked
from ..checkpoint.released_templates import GENE
from ..errors import InputError, reading, say
from ..loading import expect_long_texts
from .gene_turns import TurnsApart
from .hub_data import (
    Entries,
    checked_ids,
    documents,
    fingerprint_of,
    is_hub_id,
    load_hub_data,
    name_of,
)
from .text import TextTokenizer

SPLITS = ("train", "valid", "test")
# mlx-lm's settings of the columns, in the order that it looks for them, and their defaults.
FEATURES = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "text_feature": "text",
    "chat_feature": "messages",
}
_TEXT = (".txt", ".md")
_HELD_OUT = 0.05  # share of the tokens of plain texts that becomes the validation split
_PIECE = 1 << 20  # characters that are tokenised in one call
_FORMAT = 2  # version of the token files

_LEFT_OUT = "left_out.json"  # in a token file's folder: the places of rows without a text
_SHOWN = 5  # of these places
# (ids, length of the prompt) of each text; (ids, None) continues the previous text.
Documents = Iterator[tuple[list[int], int | None]]


@dataclass(frozen=True)
class Corpus:
    """Concatenated token ids of N texts."""

    name: str  # for messages
    tokens: np.ndarray  # ids of all texts, (T,)
    starts: np.ndarray  # index of each text's first token, (N,)
    prompts: np.ndarray  # tokens at the start of each text that the loss ignores, (N,)

    @property
    def digest(self) -> str:
        """Return twelve digits that identify the tokens and the starts."""
        return digest_of(np.ascontiguousarray(a).tobytes() for a in (self.tokens, self.starts))

    @property
    def ends(self) -> np.ndarray:
        """Return the index after each text's last token, (N,)."""
        return np.append(self.starts[1:], len(self.tokens))

    def part(self, begin: int, end: int, name: str) -> "Corpus":
        """Return the tokens begin..end; a text across a border is cut."""
        touched = (self.ends > begin) & (self.starts < end)
        starts = self.starts[touched]
        prompts = np.maximum(0, self.prompts[touched] - np.maximum(0, begin - starts))
        return Corpus(name, self.tokens[begin:end], np.maximum(0, starts - begin), prompts)


def load_corpora(
    path: Path,
    tokenizer: Any,
    *,
    mask_prompt: bool,
    cache_dir: Path,
    splits: Sequence[str],
    hf_dataset: Entries | None = None,
    features: Mapping[str, str] | None = None,
) -> dict[str, Corpus]:
    """Return the tokens of these splits, tokenised now or by an earlier run.

    Args:
        path: a folder with jsonl files or texts, a single file, or OWNER/NAME of a dataset.
        tokenizer: mlx-lm's wrapper.
        mask_prompt: leave prompts out of the loss.
        cache_dir: folder for the token files.
        splits: names from `SPLITS`. The result lacks those that the data does not have, but plain
            texts without a valid split give their last 5 %, which train then lacks.
        hf_dataset: datasets to read instead of `path`, as in mlx-lm's YAML files.
        features: names of columns by mlx-lm's settings, such as prompt_feature; the others have
            mlx-lm's names.

    Raises:
        InputError: there is no data, or a text cannot be used. The message has the place.
    """

    expect_long_texts(tokenizer)
    tokenizer = TextTokenizer(
        TurnsApart(tokenizer) if tokenizer.chat_template == GENE else tokenizer
    )

    columns = {"mask_prompt": mask_prompt, **FEATURES, **(features or {})}
    left_out: list[str] = []

    def tokenised(name: str, key: str, size: str, texts: Callable[[], Documents]) -> Corpus:
        target = cache_dir.expanduser() / "tokens" / _cache_key(key, tokenizer, columns)
        with locked(target):
            if not target.is_dir():
                say(f"Tokenising {size}.")
                left_out.clear()
                _write(target, name, texts(), left_out)
        _tell_left_out(target / _LEFT_OUT)
        return Corpus(
            name=name,
            tokens=np.memmap(target / "tokens.bin", np.uint32, "r"),
            starts=np.load(target / "starts.npy"),
            prompts=np.load(target / "prompts.npy"),
        )

    if hf_dataset is not None or is_hub_id(path):
        source = path.as_posix() if hf_dataset is None else hf_dataset
        data = load_hub_data(source, tokenizer, columns, splits=splits)
        return {
            split: tokenised(
                f"{name_of(source)} ({split})",
                fingerprint_of(rows),
                f"{len(rows)} rows of {name_of(source)} ({split})",
                partial(documents, name_of(source), rows),
            )
            for split, rows in data.items()
        }
    found = find_files(path)
    if not any(found.values()):
        raise InputError(
            f"--data {path} has no data. Give a folder with train.jsonl (and valid.jsonl, "
            "test.jsonl), or with .txt or .md files."
        )
    _tell_not_read(path, found)
    plain = all(file.suffix in _TEXT for files in found.values() for file in files)
    if mask_prompt and plain:
        raise InputError(
            f"--mask-prompt has no effect on {path}: plain texts have no prompts. Leave it out."
        )
    held_out = "valid" in splits and plain and bool(found["train"]) and not found["valid"]
    corpora = {
        split: tokenised(
            f"{path} ({split})",
            _state_of(found[split]),
            f"{len(found[split])} file(s), {_megabytes(found[split]):.1f} MB",
            partial(_documents, found[split], tokenizer, columns, left_out),
        )
        for split in dict.fromkeys([*splits, "train"] if held_out else splits)
        if found[split]
    }
    if held_out:
        whole = corpora["train"]
        cut = int(len(whole.tokens) * (1 - _HELD_OUT))
        corpora["train"] = whole.part(0, cut, whole.name)
        corpora["valid"] = whole.part(cut, len(whole.tokens), f"the last 5 % of {whole.name}")
    return {split: corpora[split] for split in splits if split in corpora}


def find_files(path: Path) -> dict[str, list[Path]]:
    """Return the files of each split.

    A folder with train.jsonl, valid.jsonl or test.jsonl is read as mlx-lm reads it. In other
    folders the sub-folders train, valid and test are the splits. Without a sub-folder train,
    all texts belong to the split train.

    Raises:
        InputError: the path is not a folder or a text, or a file is a link that leads out of it.
    """
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    if path.is_file() and path.suffix in (*_TEXT, ".jsonl"):
        return found | {"train": [path]}
    if not path.is_dir():
        raise InputError(
            f"--data {path} is neither a folder, nor a .txt, .md or .jsonl file, nor OWNER/NAME "
            "of a dataset on the hub."
        )
    jsonl = {split: path / f"{split}.jsonl" for split in SPLITS}
    if any(file.is_file() for file in jsonl.values()):
        for file in jsonl.values():
            check_link(file, path)
        return {split: [file] if file.is_file() else [] for split, file in jsonl.items()}
    if (path / "train").is_dir():
        return {split: _texts(path / split) for split in SPLITS}
    return found | {"train": _texts(path)}


def _texts(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix in _TEXT)
    # macOS writes a file `._name.txt` beside each file on a foreign file system.
    texts = sorted(
        file
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    for file in texts:
        check_link(file, folder)
    return texts


def _tell_not_read(path: Path, found: Mapping[str, list[Path]]) -> None:
    files = path.iterdir() if path.is_dir() else ()
    read = {file for its in found.values() for file in its}
    rest = sorted(
        file.name
        for file in files
        if file.is_file() and file not in read and not file.name.startswith(".")
    )
    if rest:
        more = f" and {len(rest) - _SHOWN} more" if len(rest) > _SHOWN else ""
        say(f"Not read in {path}: {', '.join(rest[:_SHOWN])}{more}.")


def _tell_left_out(file: Path) -> None:
    places = json.loads(file.read_text(encoding="utf-8"))
    if places:
        more = len(places) - _SHOWN
        end = f" and {more} more" if more > 0 else ""
        say(f"Left out, for want of a text: {'; '.join(places[:_SHOWN])}{end}.")


def _write(target: Path, name: str, texts: Documents, left_out: list[str]) -> None:
    """Tokenise texts into a folder, atomically.

    `left_out` has the places of rows without a text when all texts are read.
    """
    starts, prompts, total = [], [], 0
    with new_folder(target) as folder:
        with (folder / "tokens.bin").open("wb") as out:
            for ids, prompt in texts:
                if prompt is not None:
                    starts.append(total)
                    prompts.append(prompt)
                out.write(np.asarray(ids, np.uint32).tobytes())
                total += len(ids)
        if not total:
            raise InputError(f"{name} has no text.")
        (folder / _LEFT_OUT).write_text(json.dumps(left_out), encoding="utf-8")
        np.save(folder / "starts.npy", np.array(starts, np.int64))
        np.save(folder / "prompts.npy", np.array(prompts, np.int64))


def _documents(
    files: list[Path], tokenizer: Any, columns: Mapping[str, Any], left_out: list[str]
) -> Documents:
    for file in files:
        if file.suffix in _TEXT:
            yield from _plain_text(file, tokenizer)
        else:
            yield from _json_lines(file, tokenizer, columns, left_out)


def _plain_text(file: Path, tokenizer: Any) -> Documents:
    first = True
    try:
        # utf-8-sig leaves a byte order mark out.
        with io.TextIOWrapper(open_regular(file), encoding="utf-8-sig") as lines:
            # Pieces of whole lines: no word is cut, and a large text does not fill the memory.
            while piece := lines.readlines(_PIECE):
                yield (
                    tokenizer.encode("".join(piece), add_special_tokens=first),
                    0 if first else None,
                )
                first = False
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}.") from error
    if not first and tokenizer.eos_token_id is not None:
        yield [tokenizer.eos_token_id], None


def _json_lines(
    file: Path, tokenizer: Any, columns: Mapping[str, Any], left_out: list[str]
) -> Documents:
    prompt, completion, text, chat = (columns[name] for name in FEATURES)
    dataset: Any = None
    with open_regular(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            with reading(f"{where} is not JSON"):
                record = json.loads(line)
            if not isinstance(record, dict):
                raise InputError(f'{where} is not a JSON object such as {{"text": "..."}}.')
            pair = {prompt, completion} <= record.keys()
            content = record.get(text)
            empty = record.get(chat) == [] or (isinstance(content, str) and not content.strip())
            if empty and not pair:
                left_out.append(where)
                continue
            if (pair or chat in record) and not tokenizer.has_chat_template:
                raise InputError(
                    f"{where} is of a chat, and this model has no chat template. Give rows with "
                    f"{text}, or a model with a template."
                )
            keys = ", ".join(record)[:80] or "none"
            with reading(
                f"{where} cannot be used; its keys: {keys}. Allowed: {text}, or {chat}, or "
                f"{prompt} and {completion}, as in the first line. The error"
            ):
                dataset = dataset or create_dataset([record], tokenizer, SimpleNamespace(**columns))
                yield checked_ids(*dataset.process(record))


def _megabytes(files: list[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def _state_of(files: list[Path]) -> str:
    """Return a text that changes with the path, size or time of a file."""
    states = ((file.resolve(), file.stat()) for file in files)
    return "".join(f"{path} {state.st_size} {state.st_mtime_ns}\n" for path, state in states)


def _cache_key(source: str, tokenizer: Any, columns: Mapping[str, Any]) -> str:
    """Return digits that change with everything that affects the tokens."""
    digest = hashlib.sha256(f"{_FORMAT} {columns} {tokenizer.eos_token_id}\n".encode())
    digest.update(source.encode())
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    backend = getattr(inner, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else json.dumps(sorted(inner.get_vocab()))
    settings = (known, tokenizer.chat_template, getattr(inner, "add_bos_token", None))
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:24]
