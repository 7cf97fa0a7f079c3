"""Treat spaces in a Hugging Face tokenizer as SentencePiece does.

Not covered: the vocabulary and merges, which transformers reads correctly.
"""

from typing import Any


def treat_spaces(
    backend: Any, *, prefix: bool, collapse: bool, charsmap: bytes = b"", legacy: bool = True
) -> None:
    """Normalise text as a SentencePiece model does.

    Args:
        backend: a `tokenizers.Tokenizer` of transformers' Llama class; changed in place.
        prefix: whether the model puts a space before the first word (`add_dummy_prefix`).
        collapse: whether it drops repeated and outer spaces (`remove_extra_whitespaces`).
        charsmap: its table of characters; empty for none.
        legacy: whether to put a space also after each special token, as the tokenizers of
            2023 did and chat models of that time expect.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = []
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    if collapse:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Replace(Regex(r" \z"), ""))
    if legacy or not prefix:
        if collapse:
            steps.append(normalizers.Replace(Regex(r"\A "), ""))
        if prefix:
            steps.append(normalizers.Prepend("▁"))
        steps.append(normalizers.Replace(" ", "▁"))
        backend.pre_tokenizer = None
    else:
        if not collapse:
            # Metaspace mistakes a leading space for the one that it would add.
            steps.append(normalizers.Replace(Regex(r"\A "), "  "))
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.normalizer = normalizers.Sequence(steps)
