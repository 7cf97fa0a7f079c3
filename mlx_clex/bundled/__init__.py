"""Small models that are part of the package, and their training text.

`base` is a LLaMA of one million parameters, trained at 64 tokens on the King James Bible
without Judges, Ruth and 1 Samuel. `clex` and `gene` are fine-tunes of it with all weights
trained. `python -m benchmarks.bundled_models` makes all three.

The text comes from Debian's package bible-kjv-text 4.29. A chapter is a heading and one line
for each verse. The text is in the public domain, except that in the United Kingdom the Crown
holds letters patent on printing it.
"""

import functools
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

FOLDER = Path(__file__).parent
PREFIX = "bundled:"  # marks the name of a bundled model
MODELS = {name: f"{PREFIX}{name}" for name in ("base", "clex", "gene")}  # names that `load` takes
DEFAULT = MODELS["clex"]  # the model of commands that are given none
OPENING = "And it came to pass"  # a prompt in the style of the training text
HELD_OUT = ("Judges", "Ruth", "1 Samuel")  # neighbouring books, so that windows may cross them
_FIRST_BEHIND = "2 Samuel"
QUESTION = "The pass key is"  # precedes the key in the statement and ends the prompt


def folder(name: str) -> Path:
    """Return the folder of a bundled model.

    Raises:
        InputError: there is no bundled model of this name.
    """
    if name not in MODELS:
        raise InputError(f"There is no bundled model {name!r}. There are: {', '.join(MODELS)}.")
    return FOLDER / name


@functools.cache
def text() -> str:
    """Return the whole text with one line for each verse."""
    return lzma.decompress((FOLDER / "king_james.txt.xz").read_bytes()).decode("ascii")


def held_out_text() -> str:
    """Return the books that no bundled model was trained on."""
    return text()[slice(*_held_out_span())]


def training_text() -> str:
    """Return all books that are not held out."""
    begin, end = _held_out_span()
    return text()[:begin] + text()[end:]


def _held_out_span() -> tuple[int, int]:
    return text().index(f"{HELD_OUT[0]} 1\n"), text().index(f"{_FIRST_BEHIND} 1\n")


def statement(key: str) -> str:
    """Return the line that states a key."""
    return f"{QUESTION} {key}."


def words_task(
    rng: np.random.Generator, tokenizer: Any, length: int, depth: float
) -> tuple[list[int], str]:
    """Return a prompt that hides a key among verses of the held-out books, and the key.

    Args:
        rng: draws the key and the first verse.
        tokenizer: the tokenizer of a bundled model.
        length: largest length of the prompt, tokens.
        depth: position of the key, 0 (before the verses) to 1 (after them).

    Returns:
        (ids of the prompt, the key, which is one digit).

    Raises:
        ValueError: `length` is too small for the statement and the question.
    """
    key = str(rng.integers(0, 10))
    told = tokenizer.encode(statement(key) + "\n", add_special_tokens=False)
    asked = tokenizer.encode(QUESTION, add_special_tokens=False)
    room = length - len(told) - len(asked)
    if room < 0:
        raise ValueError(f"the prompt needs {length - room} tokens without filler")
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
