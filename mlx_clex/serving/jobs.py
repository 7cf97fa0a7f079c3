"""The jobs of a request, between the thread of its client and the thread that generates.

Not covered: what a job is (`requests.py`), and what becomes of it (`generation.py`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, Queue
from typing import Any

import mlx_lm.server as stock

from ..errors import RunError


class Ticket:
    """Where the generation thread puts what it makes for one job of a request."""

    def __init__(self, index: int, queue: Queue) -> None:
        """`queue`: of the request, which gets (index, what was put)."""
        self.context: stock.GenerationContext | None = None
        self.stopped = self.alone = False  # alone: served outside of a batch
        self._index, self._queue = index, queue

    def put(self, item: Any) -> None:
        """Take the context, then tokens, progress, an error, or None at the end.

        Raises:
            RunError: it was stopped while its prompt is read outside of a batch.
        """
        if isinstance(item, stock.GenerationContext):
            self.context = item
            if self.stopped:
                item.stop()
        self._queue.put((self._index, item))
        # mlx-lm sees that a job was stopped at its first token, which may be minutes away.
        if self.alone and self.stopped and isinstance(item, tuple):
            raise RunError("The request was stopped.")

    def stop(self) -> None:
        """End generation; nothing more is wanted."""
        self.stopped = True
        if self.context is not None:
            self.context.stop()


class Jobs:
    """The jobs of one request, handed to the generation thread."""

    def __init__(
        self,
        generator: Any,
        jobs: Sequence[Any],
        watch: Callable[[], None] | None = None,
    ) -> None:
        """Hand jobs over.

        Args:
            generator: the thread, a `PlanningResponseGenerator`.
            jobs: pairs of mlx-lm's request and generation arguments.
            watch: called once a second while items are awaited; what it raises ends that.
        """
        self._generator = generator
        self._watch, self._watched = watch, time.monotonic()
        self._queue: Queue[tuple[int, Any]] = Queue()
        self._jobs = [(Ticket(index, self._queue), *job) for index, job in enumerate(jobs)]
        for job in self._jobs:
            generator.requests.put(job)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield (index, item) as they come.

        A job's first item is what mlx-lm knows of it, once it is admitted. Then come a
        `Response` for each token, and (tokens read, tokens to read).

        Raises:
            RequestError: a job cannot be answered.
            RunError: generation failed.
        """
        running = len(self._jobs)
        while running:
            index, item = self._next()
            if item is None:
                running -= 1
            else:
                yield index, item

    def _next(self) -> tuple[int, Any]:
        while True:
            if self._watch is not None and time.monotonic() - self._watched >= 1:
                self._watched = time.monotonic()
                self._watch()
            try:
                index, item = self._queue.get(timeout=1)
            except Empty:
                if not self._generator.generation_available():
                    raise RunError("Generation has ended.") from None
                continue
            if isinstance(item, Exception):
                raise item
            return index, item

    def stop(self) -> None:
        """End all jobs, where mlx-lm can; outside of batches several processes cannot."""
        for ticket, _, args in self._jobs:
            if self._generator.can_stop(args):
                ticket.stop()
