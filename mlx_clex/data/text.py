"""Texts from outside and their tokens, the same from a file, from stdin or in a row of data.

A byte order mark is dropped, lines end in LF, and one BOS token at most begins a text.

Not covered: the options that texts come from (`serving/prompt.py`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.files import expand, open_regular
from ..errors import InputError


def read_text(file: str | Path, option: str = "") -> str:
    """Return the text of a UTF-8 file; see `normalise_text`.

    Args:
        file: its path; ~ stands for the home folder.
        option: put before the path in an error.

    Raises:
        InputError: the file cannot be read, or is no UTF-8.
    """
    path = expand(file, option)
    try:
        with open_regular(path, pipe=True) as source:
            data = source.read()
    except InputError as error:
        raise InputError(f"{option}{path} cannot be read: it is not a file.") from error
    except OSError as error:
        raise InputError(f"{option}{path} cannot be read: {error.strerror}.") from error
    return decode_text(data, f"{option}{path}")


def decode_text(data: bytes, what: str) -> str:
    """Return the text of bytes in UTF-8; see `normalise_text`.

    Raises:
        InputError: it is no UTF-8; `what` begins the message.
    """
    try:
        return normalise_text(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is no UTF-8 text: {error}. Save it as UTF-8.") from error


def normalise_text(text: str) -> str:
    """Return the text without a byte order mark, with lines that end in LF."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def encode_text(
    tokenizer: Any,
    text: str,
    *,
    begins: bool,
    behind: str | None = None,
    limit: int | None = None,
) -> list[int]:
    """Return the tokens of a text.

    Args:
        tokenizer: mlx-lm's wrapper.
        text: may begin with the BOS text itself.
        begins: the text is bare and begins a sequence, so the tokenizer adds its special
            tokens. False for a rendered chat template, which has its own, and for text
            that follows other tokens.
        behind: the text of the tokens that it follows, as far as it is known, at least its last
            token or character. Tokenizers such as Llama-2's begin a text with a space; without
            `behind`, so does this one.
        limit: of the model, in tokens. A text that must have more is refused at once: tokenising
            60 MB takes minutes and gigabytes.

    Raises:
        InputError: it is too long, or has half of a surrogate pair, which is no character.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f"A text has half of a surrogate pair, {half!a}: no character.") from error
    if limit is not None and size > limit and size > limit * longest_token(tokenizer):
        raise InputError(
            f"The text has {size} bytes, and this model reaches {limit} tokens of at most "
            f"{longest_token(tokenizer)} bytes each. Shorten the text."
        )
    if behind is not None:
        return _behind(tokenizer, behind, text)
    bare = without_bos(tokenizer, text) if begins else text
    # Not verbose: its warning names max_position_embeddings, which a scaling exceeds.
    tokens = list(tokenizer.encode(bare, add_special_tokens=begins, verbose=False))
    if bare != text and tokens[:1] != [tokenizer.bos_token_id]:
        tokens.insert(0, tokenizer.bos_token_id)  # asked for, of a tokenizer that adds none
    return tokens


def _behind(tokenizer: Any, before: str, text: str) -> list[int]:
    """Return the tokens of a text that stands behind another one, without its own."""
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    known, both = encode(before), encode(before + text)
    # Where the two share a token, the text is tokenised by itself.
    return both[len(known) :] if both[: len(known)] == known else encode(text)


def longest_token(tokenizer: Any) -> int:
    """Return the bytes of text that one token stands for, at most."""
    return max((len(text.encode()) for text in tokenizer.get_vocab()), default=1)


def without_bos(tokenizer: Any, text: str) -> str:
    """Return the text without BOS texts at its beginning.

    For text that stands behind a BOS token already: in a chat template or after a cache.
    """
    while tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text.removeprefix(tokenizer.bos_token)
    return text


class TextTokenizer:
    """A tokenizer of mlx-lm that takes texts as they stand in the rows of a data set."""

    def __init__(self, tokenizer: Any) -> None:
        self._inner = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text; without special tokens it follows other text.

        Raises:
            TypeError: it is not one text.
        """
        if not isinstance(text, str):
            raise TypeError("its text is not one text")
        return encode_text(self._inner, normalise_text(text), begins=add_special_tokens)

    def apply_chat_template(self, messages: Sequence[Any], **options: Any) -> Any:
        """Return the ids, or the text, of messages; the template brings the BOS token."""
        return self._inner.apply_chat_template([self._clean(m) for m in messages], **options)

    def _clean(self, message: Any) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str):
            return message
        return {**message, "content": without_bos(self._inner, normalise_text(content))}
