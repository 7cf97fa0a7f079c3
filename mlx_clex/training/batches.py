"""Make batches of token ids, in an order that can be resumed.

`concat` lays all texts end to end and cuts them into sequences of one length, so no token
is padding and attention needs no mask. `plain` gives every text a row of its own, texts
of similar length together.

Not covered: scales and positions.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..data.batch import Batch
from ..data.corpus import Corpus
from ..errors import InputError

PACKINGS = ("concat", "plain")
_SMALL_BATCH = 256  # sequences that a batch may have even where the corpus has fewer
_MULTIPLE = 32  # tokens; rows of `plain` are padded to it, so that few shapes are traced


class Batches:
    """Endless batches of a corpus, shuffled anew in each epoch."""

    def __init__(
        self, corpus: Corpus, *, packing: str, length: int, batch_size: int, seed: int
    ) -> None:
        """Cut the corpus into rows.

        Args:
            corpus: the texts.
            packing: one of `PACKINGS`.
            length: tokens of the longest row.
            batch_size: rows of a batch.
            seed: decides the order of the rows.

        Raises:
            InputError: the corpus is too small for one row or batch.
        """
        self.corpus = corpus
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.index = 0  # number of the next batch in the epoch
        self.cut = 0  # texts whose end does not fit into a row
        self.mute = 0  # texts without a token to learn in their row
        self._masked = bool(corpus.prompts.any())
        self._make = self._windows if packing == "concat" else self._rows
        self._groups: list[np.ndarray] | None = None
        self._left_over = np.array([], int)  # texts, too few for a group
        if packing == "plain":
            self._left_over, self._groups = self._grouped()
        else:
            self._items = (len(corpus.tokens) - 1) // length
            if self._items < 1:
                raise InputError(
                    f"{corpus.name} has {len(corpus.tokens)} tokens, shorter than one sequence "
                    f"of {length} + 1: give more text, or a smaller --max-seq-length."
                )
            if batch_size > max(self._items, _SMALL_BATCH):
                raise InputError(
                    f"--batch-size {batch_size} is more than the {self._items} sequences of "
                    f"{corpus.name}: give a smaller one, or more text."
                )
        self._order = self._shuffled()

    @property
    def per_epoch(self) -> int:
        """How many batches one pass over the corpus has, at least 1."""
        if self._groups is not None:
            return len(self._groups)
        return max(1, self._items // self.batch_size)

    def chosen(self, count: int) -> list[np.ndarray]:
        """Choose batches that are spread evenly over the corpus.

        Args:
            count: how many at most; -1: all. The last one of all may have fewer rows.

        Returns:
            Numbers of the rows of each batch.
        """
        if self._groups is None:
            every = np.split(
                np.arange(self._items), range(self.batch_size, self._items, self.batch_size)
            )
        else:
            every = ([self._left_over] if len(self._left_over) else []) + self._groups
        count = len(every) if count == -1 else min(count, len(every))
        return [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)]

    def some(self, count: int) -> Iterator[Batch]:
        """Make the batches of `chosen`, each when it is asked for."""
        return map(self._make, self.chosen(count))

    def next(self) -> Batch:
        """Return the next batch."""
        if self.index == self.per_epoch:
            self.epoch += 1
            self.index = 0
            self._order = self._shuffled()
        if self._groups is None:
            first = self.index * self.batch_size
            # A corpus with fewer windows than a batch has rows: some are used twice.
            chosen = np.take(self._order, range(first, first + self.batch_size), mode="wrap")
        else:
            chosen = self._groups[self._order[self.index]]
        self.index += 1
        return self._make(chosen)

    @property
    def state(self) -> dict[str, Any]:
        """The place of the next batch in the data."""
        return {"epoch": self.epoch, "index": self.index}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in (self.epoch, self.index)):
            raise ValueError("the place in the data must be whole numbers of at least 0")
        if self.index > self.per_epoch:
            raise ValueError(f"the place in the data is beyond its {self.per_epoch} batches")
        self._order = self._shuffled()

    @property
    def _count(self) -> int:
        return self._items if self._groups is None else len(self._groups)

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(self._count)

    def _windows(self, chosen: np.ndarray) -> Batch:
        starts = chosen * self.length
        ids = np.stack([self.corpus.tokens[s : s + self.length + 1] for s in starts])
        weights = np.stack([self._weights(s + 1, s + 1 + self.length) for s in starts])
        return _batch(ids, weights)

    def _rows(self, chosen: np.ndarray) -> Batch:
        starts = self.corpus.starts[chosen]
        lengths = np.minimum(self.corpus.ends[chosen] - starts, self.length + 1)
        padded = -(-(lengths.max() - 1) // _MULTIPLE) * _MULTIPLE
        width = min(int(padded), self.length) + 1
        ids = np.zeros((len(chosen), width), np.int64)
        weights = np.zeros((len(chosen), width - 1), np.float32)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            ids[row, :length] = self.corpus.tokens[start : start + length]
            weights[row, : length - 1] = self._weights(start + 1, start + length)
        return _batch(ids, weights)

    def _grouped(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the shortest texts that fill no group, and groups of texts of similar length."""
        lengths = self.corpus.ends - self.corpus.starts
        shown = np.minimum(lengths, self.length + 1)
        order = np.argsort(lengths, kind="stable")
        order = order[(shown > np.maximum(self.corpus.prompts, 1))[order]]
        self.mute = len(lengths) - len(order)
        self.cut = int((lengths[order] > self.length + 1).sum())
        if len(order) < self.batch_size:
            raise InputError(
                f"{self.corpus.name} has {len(order)} texts with a token to learn within "
                f"--max-seq-length {self.length}, fewer than the {self.batch_size} of a batch: "
                "lower --batch-size, or use --packing concat."
            )
        left_over = len(order) % self.batch_size
        return order[:left_over], np.split(order[left_over:], len(order) // self.batch_size)

    def _weights(self, begin: int, end: int) -> np.ndarray:
        """Return 1 for tokens that the loss counts and 0 for prompts, (end - begin,)."""
        if not self._masked:
            return np.ones(end - begin, np.float32)
        index = np.arange(begin, end)
        text = np.searchsorted(self.corpus.starts, index, side="right") - 1
        inside = index - self.corpus.starts[text]
        return (inside >= self.corpus.prompts[text]).astype(np.float32)


def _batch(ids: np.ndarray, weights: np.ndarray) -> Batch:
    ids = ids.astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], weights)
