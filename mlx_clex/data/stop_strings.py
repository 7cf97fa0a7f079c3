"""Cut a text at stop strings while the text is generated.

Stop strings match on text, so it does not matter how tokens divide the text. The server
and `evaluate` both cut here.

Not covered: tokens that end an answer, which mlx-lm matches by their ids.
"""

from collections.abc import Sequence


class StopStrings:
    """Pass a text on piece by piece, up to the stop string that is complete first.

    Where two stop strings end at the same character, the longer one counts. The result
    is the same however the text is divided into pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Watch for these strings, none of them empty."""
        assert all(strings), "an empty string would match everywhere"
        self._strings = tuple(strings)
        self._longest = max(map(len, strings), default=0)
        self._held = ""  # text that may be the beginning of a stop string
        self.found = False

    def add(self, piece: str) -> str:
        """Return the text that can be passed on now."""
        if self.found or not self._strings:
            return "" if self.found else piece
        text = self._held + piece
        places = [(text.find(string), string) for string in self._strings]
        ends = [(start + len(string), start) for start, string in places if start >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = min(len(text), self._longest - 1)
        while keep and not any(string.startswith(text[-keep:]) for string in self._strings):
            keep -= 1
        safe = len(text) - keep
        self._held = text[safe:]
        return text[:safe]

    def end(self) -> str:
        """Return the text still held back, after the last piece."""
        held, self._held = self._held, ""
        return held


def cut(text: str, strings: Sequence[str]) -> str:
    """Return the text up to the first of the stop strings."""
    stops = StopStrings(strings)
    return stops.add(text) + stops.end()
