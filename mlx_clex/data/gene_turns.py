"""Tokenise chat turns the way GeNE's instruction data was tokenised.

GeNE tokenised each piece by itself: "user: ", the text, "\\n\\nassistant: ", and the answer
with its end token. A chat template renders one text, whose tokens differ where pieces meet.

Source: GeNE's repository, dataset.py, `InstructionDataset.__getitem__`.

Not covered: prompts at inference, which use the chat template, and system messages, which
GeNE's data does not have.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class TurnsApart:
    """A tokenizer of mlx-lm whose chat turns are tokenised piece by piece."""

    def __init__(self, tokenizer: Any) -> None:
        self._inner = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> list[int]:
        """Return the ids of chat turns; after a question they end where the answer begins."""
        ids = [self._inner.bos_token_id]
        for message in messages:
            for piece in self._pieces(message["role"], message["content"]):
                ids += self._inner.encode(piece, add_special_tokens=False)
        return ids

    def _pieces(self, role: str, text: str) -> list[str]:
        if role == "user":
            return ["user: ", text, "\n\nassistant: "]
        return [text + self._inner.eos_token] if role == "assistant" else [text + "\n\n"]
