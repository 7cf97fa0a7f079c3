"""The text of one answer: its reasoning, its tool calls, and where a stop string ends it.

Not covered: OpenAI's objects around the text (`answers.py`).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from ..data.stop_strings import StopStrings

_BEFORE = 16  # tokens of the prompt that an answer is decoded after; a character has 4 at most

# (state, text): "reasoning", "tool", or "normal" for the text that a client shows
Parts = list[tuple[str, str]]


class AnswerText:
    """Decode an answer token by token, and end it at a stop string of the request.

    It stands in for mlx-lm's `StopSequences` and its matcher, which compare token ids: a stop
    string that tokens divide in another way than its own encoding would not be found. The
    generation thread calls `advance` once for each token; the thread of the request then
    takes the text of that token. Stop strings end normal text only, neither reasoning nor
    tool calls.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], state: str, prompt: Sequence[int] = ()
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: mlx-lm's wrapper.
            stop: stop strings.
            state: in which the answer begins.
            prompt: tokens whose text the answer continues; none for a message of its own.
        """
        self.tokenizer = tokenizer
        self._ends = tokenizer.eos_token_ids
        self._detokenizer = tokenizer.detokenizer
        self._held = ""  # end of the prompt's text that the detokenizer has not given out
        if any(token not in (tokenizer.bos_token_id, tokenizer.eos_token_id) for token in prompt):
            self._begin_after(prompt[-_BEFORE:])
        # A text that continues a prompt is given as the model wrote it, marks of calls included.
        machine = TextStateMachine() if prompt else make_text_state_machine(tokenizer)
        self._state = machine.make_state(state)
        self._stops = StopStrings(stop)
        self._parts: deque[Parts] = deque()  # for each token that was not taken yet

    def _begin_after(self, prompt: Sequence[int]) -> None:
        """Decode the end of the prompt first: mlx-lm's detokenizers trim a text's first space.

        After BOS alone this is not done: there the space is the tokenizer's, not the model's.
        """
        twin = self.tokenizer.detokenizer  # reading a text changes some detokenizers
        for token in prompt:
            self._detokenizer.add_token(token)
            twin.add_token(token)
        text = twin.text
        twin.finalize()
        held = twin.text[len(text) :]
        self._detokenizer.offset = len(text)
        # A space, which the prompt has. Half of a character is shown when it is complete.
        self._held = held if "\ufffd" not in held else ""

    def matcher(self) -> "AnswerText":
        """Return the matcher of this answer, which is the object itself."""
        return self

    def advance(self, token: int) -> bool:
        """Read a token; return whether it ends the answer."""
        ended = token in self._ends
        if not ended:
            self._detokenizer.add_token(token)
            self._parts.append(self._read(self._segment()))
        else:
            self._parts.append([])
        return ended or self._stops.found

    def take(self) -> Parts:
        """Return the text of the next token."""
        return self._parts.popleft()

    def finish(self) -> Parts:
        """Return the text that was held back, after the last token."""
        self._detokenizer.finalize()
        parts = self._read(self._segment())
        self._state, text, state = TextStateMachine.flush(self._state)
        return [*parts, *self._cut([(state, text)]), ("normal", self._stops.end())]

    def _segment(self) -> str:
        """Return the new text, without what the prompt has of it."""
        text = self._detokenizer.last_segment
        if text and self._held:
            text, self._held = text.removeprefix(self._held), ""
        return text

    def _read(self, text: str) -> Parts:
        self._state, parts = TextStateMachine.split(self._state, text)
        return self._cut(parts)

    def _cut(self, parts: Iterable[tuple[str, str]]) -> Parts:
        """Pass parts on, up to a stop string."""
        out: Parts = []
        for state, text in parts:
            if state == "normal":
                # Also an empty text: it alone divides a tool call from the next.
                out.append((state, self._stops.add(text)))
            elif not self._stops.found:
                if held := self._stops.end():
                    out.append(("normal", held))
                out.append((state, text))
        return out
