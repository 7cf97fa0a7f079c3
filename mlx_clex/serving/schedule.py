"""Order the prompts of several requests, so that short ones do not wait for long ones.

mlx-lm reads prompts that come together side by side, padded to the longest, and each of them waits
for all. Here every prompt has a due time, its own length after its arrival, and prompts are read in
this order. Time is counted in tokens read. A long prompt gives way to a shorter one that comes
later, but to none that comes more than the long one's length later.

Not covered: requests that are served one by one, such as those with a seed.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import BatchGenerator

_SLICE = 512  # tokens of a prompt read in one pass while other requests wait or run
_STEPS = 16  # tokens for each running answer between two slices of a prompt
_PADDED = 1.25  # tokens with padding / tokens, of prompts that are read side by side


@dataclass
class _Place:
    """A prompt's place in the queue."""

    due: int  # tokens read by this generator
    read: int = 0  # tokens of the prompt that were read before it gave way


class DueBatchGenerator(BatchGenerator):
    """mlx-lm's batch generator, reading the prompt that is due first."""

    completion_batch_size: int
    prefill_batch_size: int
    prefill_step_size: int
    _unprocessed_sequences: deque[Any]
    _currently_processing: list[Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take mlx-lm's arguments; `prefill_step_size` bounds the tokens of a pass of all rows."""
        super().__init__(*args, **options)
        self._most_tokens, self._most_rows = self.prefill_step_size, self.prefill_batch_size
        self._places: dict[int, _Place] = {}
        self._steps = 0  # of decoding, since a slice was read

    def _next(self) -> tuple[list[Any], list[Any]]:
        self._arrange()
        capacity = self.completion_batch_size
        self._steps += 1
        if self._steps <= _STEPS and self._slices_left() > 1 and len(self._generation_batch):
            self.completion_batch_size = 0  # mlx-lm then only decodes
        else:
            self._steps = 0
        try:
            return super()._next()
        finally:
            self.completion_batch_size = capacity

    def _arrange(self) -> None:
        """Sort the waiting prompts, and choose those that are read together, and their slice."""
        clock = self._counters.prompt_tokens
        waiting, reading = self._unprocessed_sequences, self._prompt_batch.uids
        for uid, segments, *_ in waiting:
            self._places.setdefault(uid, _Place(clock + _tokens(segments)))
        present = {*reading, *(sequence[0] for sequence in waiting)}
        self._places = {uid: self._places[uid] for uid in present}
        if waiting and reading:
            first = min(self._places[sequence[0]].due for sequence in waiting)
            done = any(_tokens(segments) == 1 for segments, *_ in self._currently_processing)
            if not done and first < min(self._places[uid].due for uid in reading):
                self._give_way()
        self._unprocessed_sequences = deque(sorted(waiting, key=lambda s: self._places[s[0]].due))
        # mlx-lm fills the batch up to this.
        self.prefill_batch_size = len(self._prompt_batch) or self._side_by_side()
        alone = len(present) <= 1 and not len(self._generation_batch)
        self.prefill_step_size = self._most_tokens if alone else min(_SLICE, self._most_tokens)

    def _give_way(self) -> None:
        """Put the prompts that are being read back among those that wait."""
        batch = self._prompt_batch
        for row, (segments, read, _) in enumerate(self._currently_processing):
            self._places[batch.uids[row]].read = read
            self._unprocessed_sequences.append(
                (
                    batch.uids[row],
                    segments,
                    batch.max_tokens[row],
                    batch.extract_cache(row),
                    batch.tokens[row],
                    batch.samplers[row],
                    batch.logits_processors[row],
                    batch.stop_sequences[row],
                )
            )
        batch.filter([])
        self._currently_processing = []

    def _side_by_side(self) -> int:
        """Return how many of the first waiting prompts are read in one batch: few and alike."""
        count = longest = total = 0
        for sequence in self._unprocessed_sequences:
            tokens = _tokens(sequence[1])
            longest, total = max(longest, tokens), total + tokens
            padded = longest * (count + 1)
            if count and (padded > self._most_tokens or padded > _PADDED * total):
                break
            count += 1
        return min(count, self._most_rows)

    def _slices_left(self) -> int:
        """Return how many slices the prompt that is read next still needs."""
        rows = [segments for segments, *_ in self._currently_processing] or [
            sequence[1] for sequence in list(self._unprocessed_sequences)[:1]
        ]
        return max((-(-_tokens(row) // self.prefill_step_size) for row in rows), default=0)

    def _make_batch(self, n: int) -> Any:
        batch = super()._make_batch(n)
        for uid, row in zip(batch.uids, self._currently_processing[-n:], strict=True):
            row[1] += self._places[uid].read
            row[2] += self._places[uid].read
        return batch


def _tokens(segments: list[list[int]]) -> int:
    return sum(map(len, segments))
