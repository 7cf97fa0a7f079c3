"""Generate prompts that hide a fact in a long text, and check the answers.

Source: GeNE (Findings of ACL 2024, 249), evaluation/passkey.py, after Mohtashami and Jaggi
(arXiv 2305.16300), for passkey; InfiniteBench (arXiv 2402.13718),
data/construct_synthetic_dataset.py and src/prompt.py, for number and kv.

Not covered: generating the answers (`reader.py`).
"""

import bisect
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundled import words_task

# (a function from n to the prompt with n pieces of filler, the fact that the prompt asks for).
Hidden = tuple[Callable[[int], str], str]

_GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def hide_passkey(rng: np.random.Generator, depth: float) -> Hidden:
    """Hide a number, stated twice on one line; n counts characters of filler."""
    key = str(rng.integers(1, 50_001))

    def text(filler: int) -> str:
        before = round(depth * filler)
        return "\n".join(
            [
                "There is an important info hidden inside a lot of irrelevant text. Find it and "
                "memorize them. I will quiz you about the important information there.",
                _garbage(before),
                f"The pass key is {key}. Remember it. {key} is the pass key.",
                _garbage(filler - before),
                "What is the pass key? The pass key is",
            ]
        )

    return text, key


def hide_number(rng: np.random.Generator, depth: float) -> Hidden:
    """Hide ten digits, of which five repeat a neighbour; n counts lines of filler."""
    digits = [str(digit) for digit in rng.integers(0, 10, 5)]
    while len(digits) < 10:
        at = int(rng.integers(len(digits)))
        digits.insert(at, digits[at])
    key = "".join(digits)

    def text(filler: int) -> str:
        before = round(depth * filler)
        lines = [_GRASS] * filler
        told = f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits."
        lines.insert(before, told)
        context = "\n".join(lines)
        return (
            "There is an important info hidden inside a lot of irrelevant text. Find it. I will "
            f"quiz you about the important information there.\n\n{context}\n\n"
            "What is the sequence of digits?\n\nThe sequence of digits is"
        )

    return text, key


def hide_value(rng: np.random.Generator, depth: float) -> Hidden:
    """Hide a value in a JSON object and ask for it by its key; n counts the other pairs."""
    key, value = _pair(rng)
    others: list[tuple[str, str]] = []

    def text(filler: int) -> str:
        others.extend(_pair(rng) for _ in range(filler - len(others)))
        before = round(depth * filler)
        pairs = [*others[:before], (key, value), *others[before:filler]]
        data = ", ".join(f'"{name}": "{content}"' for name, content in pairs)
        return (
            "Extract the value corresponding to the specified key in the JSON object below.\n\n"
            f'JSON data:\n{{{data}}}\n\nKey: "{key}"\n'
            "The value associated with the specified key is: "
        )

    return text, value


def _garbage(characters: int) -> str:
    period = _GRASS + " "
    return (period * (characters // len(period) + 1))[:characters]


def _pair(rng: np.random.Generator) -> tuple[str, str]:
    first, second = (str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2))
    return first, second


def first_number_is(reply: str, fact: str) -> bool:
    """Return whether the first number in the reply is the fact."""
    found = re.search(r"[0-9]+", reply)
    return found is not None and found[0] == fact


def has_word(reply: str, fact: str) -> bool:
    """Return whether the fact is a word of the reply."""
    return fact in re.split(r"[\s:\"'.,?!{}]+", reply)


# Draws a prompt: (generator, tokenizer, length limit in tokens, depth 0..1) -> (ids, fact).
Draw = Callable[[np.random.Generator, Any, int, float], tuple[list[int], str]]


@dataclass(frozen=True)
class Task:
    """A kind of prompt and the check of its answer."""

    draw: Draw
    answer_tokens: int  # length limit of the answer, tokens
    found: Callable[[str, str], bool]  # (answer, fact) -> whether the answer counts as correct


def _filled(hide: Callable[[np.random.Generator, float], Hidden]) -> Draw:
    """Return a `Draw` that adds as much filler as fits."""

    def draw(
        rng: np.random.Generator, tokenizer: Any, length: int, depth: float
    ) -> tuple[list[int], str]:
        text, fact = hide(rng, depth)

        def tokens(filler: int) -> int:
            return len(tokenizer.encode(text(filler)))

        if tokens(0) > length:
            raise ValueError(f"the prompt needs {tokens(0)} tokens without filler")
        high = 1
        while tokens(high) <= length:
            high *= 2
        filler = bisect.bisect_right(range(high), length, lo=high // 2, key=tokens) - 1
        return tokenizer.encode(text(filler)), fact

    return draw


TASKS = {
    "passkey": Task(_filled(hide_passkey), 10, first_number_is),
    "number": Task(_filled(hide_number), 12, first_number_is),
    "kv": Task(_filled(hide_value), 50, has_word),
    "words": Task(words_task, 10, first_number_is),
}
