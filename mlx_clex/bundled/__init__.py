"""Small models that come with the package, and the text they were trained on.

`base` is a LLaMA of one million parameters, trained at 64 tokens on the King James Bible
without Judges, Ruth and 1 Samuel; `clex` and `gene` are fine-tunes of it, whole models of
their own. `python -m benchmarks.bundled_models` is how they were made.

The text is in the public domain (in the United Kingdom the Crown has letters patent on
printing it). Taken from Debian's package bible-kjv-text 4.29; each chapter is a heading and
one line a verse.

Not covered: choosing these as defaults, which the commands do themselves.
"""

import functools
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

FOLDER = Path(__file__).parent
PREFIX = "bundled:"  # before the name of a model that comes with the package
MODELS = {name: f"{PREFIX}{name}" for name in ("base", "clex", "gene")}  # what `load` takes
DEFAULT = MODELS["clex"]  # where a command is given no model
OPENING = "And it came to pass"  # a text that these models can go on with
HELD_OUT = ("Judges", "Ruth", "1 Samuel")  # neighbours, so that windows cross them
_FIRST_BEHIND = "2 Samuel"
QUESTION = "The pass key is"  # before a key, told or asked for


def folder(name: str) -> Path:
    """Of a bundled model.

    Raises:
        InputError: there is none of this name.
    """
    if name not in MODELS:
        raise InputError(f"There is no bundled model {name!r}; there are: {', '.join(MODELS)}.")
    return FOLDER / name


@functools.cache
def text() -> str:
    """The whole text, one line a verse."""
    return lzma.decompress((FOLDER / "king_james.txt.xz").read_bytes()).decode("ascii")


def held_out_text() -> str:
    """The books that no bundled model has seen."""
    return text()[slice(*_held_out_span())]


def training_text() -> str:
    """All other books."""
    begin, end = _held_out_span()
    return text()[:begin] + text()[end:]


def _held_out_span() -> tuple[int, int]:
    return text().index(f"{HELD_OUT[0]} 1\n"), text().index(f"{_FIRST_BEHIND} 1\n")


def statement(key: str) -> str:
    """The line that tells a key."""
    return f"{QUESTION} {key}."


def words_task(
    rng: np.random.Generator, tokenizer: Any, length: int, depth: float
) -> tuple[list[int], str]:
    """A prompt that hides a key among verses of the held-out books, and asks for it.

    Args:
        rng: draws the key and where the verses begin.
        tokenizer: of a bundled model.
        length: the most tokens the prompt may have.
        depth: where the key is told, 0 (before the verses) to 1 (after them).

    Returns:
        (ids of the prompt, the answer that follows it, a digit).

    Raises:
        ValueError: `length` has no room for the key and the question.
    """
    key = str(rng.integers(0, 10))
    told = tokenizer.encode(statement(key) + "\n", add_special_tokens=False)
    asked = tokenizer.encode(QUESTION, add_special_tokens=False)
    room = length - len(told) - len(asked)
    if room < 0:
        raise ValueError(f"{length} tokens, of which key and question take {length - room}")
    verses = held_out_text().splitlines(keepends=True)
    at = int(rng.integers(len(verses)))
    lines: list[list[int]] = []
    while True:
        ids = tokenizer.encode(verses[at % len(verses)], add_special_tokens=False)
        if len(ids) > room:
            break
        lines.append(ids)
        room -= len(ids)
        at += 1
    lines.insert(round(depth * len(lines)), told)
    return [token for line in [*lines, asked] for token in line], key
