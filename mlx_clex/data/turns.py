"""Chat turns as GeNE's instruction data has them.

Its pieces ("user: ", a text, "\\n\\nassistant: ", an answer with its end) were tokenised apart.
A template renders them as one text, whose tokens differ where pieces meet.

Source: GeNE's repository, dataset.py, `InstructionDataset.__getitem__`.

Not covered: prompts at inference, which are rendered; system messages are not in that data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.chat_templates import GENE


def for_training(tokenizer: Any) -> Any:
    """The tokenizer itself, or one with GeNE's turns where its template is GeNE's."""
    return TurnsApart(tokenizer) if tokenizer.chat_template == GENE else tokenizer


class TurnsApart:
    """A tokenizer of mlx-lm whose chat turns are tokenised piece by piece."""

    def __init__(self, tokenizer: Any) -> None:
        self._inner = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> list[int]:
        """Ids of some turns; those of a question alone lead up to its answer."""
        ids = [self._inner.bos_token_id]
        for message in messages:
            for piece in self._pieces(message["role"], message["content"]):
                ids += self._inner.encode(piece, add_special_tokens=False)
        return ids

    def _pieces(self, role: str, text: str) -> list[str]:
        if role == "user":
            return ["user: ", text, "\n\nassistant: "]
        return [text + self._inner.eos_token] if role == "assistant" else [text + "\n\n"]
