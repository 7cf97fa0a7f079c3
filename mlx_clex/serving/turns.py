"""Run a conversation in one thread, for pages that are served from many.

MLX ties what it computes to a thread, so one thread loads and runs the model. It takes one
turn at a time.

Not covered: more than one conversation.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .conversation import Conversation

# A function that sends something to the page at once, from inside a turn.
Tell = Callable[[Any], None]


@dataclass(frozen=True)
class _Turn:
    """A job, and what its caller gets from it."""

    job: Callable[[Tell], Iterator[Any]]
    # (result, None) of each step, then (None, exception)
    results: "queue.Queue[tuple[Any, Exception | None]]" = field(default_factory=queue.Queue)
    abandoned: threading.Event = field(default_factory=threading.Event)  # nobody takes results


class Turns:
    """Runs generators in the one thread that has the model."""

    def __init__(self, load: Callable[[], Callable[[], Conversation]]) -> None:
        """Start the thread and load there.

        Raises:
            InputError: the model cannot be loaded.
        """
        self._turns: queue.Queue[_Turn | None] = queue.Queue()  # None ends the thread
        self._load = load
        self.conversation: Conversation
        loaded: queue.Queue[Exception | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(loaded,), daemon=True)
        self._thread.start()
        error = loaded.get()
        if error is not None:
            self._thread.join()
            raise error

    def _work(self, loaded: "queue.Queue[Exception | None]") -> None:
        try:
            self.conversation = self._load()()
            loaded.put(None)
            while (turn := self._turns.get()) is not None:
                self._take(turn)
        except Exception as error:
            loaded.put(error)
        finally:
            # MLX's streams of a thread that has ended can crash the interpreter's exit.
            mx.clear_streams()

    def _take(self, turn: _Turn) -> None:
        def tell(told: Any) -> None:
            turn.results.put((told, None))
            # Set in this thread, so it is this turn that stops and not a later one.
            if turn.abandoned.is_set():
                self.conversation.stop.set()

        try:
            for result in turn.job(tell):
                tell(result)
            turn.results.put((None, StopIteration()))
        except Exception as error:
            turn.results.put((None, error))

    def close(self) -> None:
        """End the thread, after the pass under way."""
        self._turns.put(None)
        while self._thread.is_alive():
            self.conversation.stop.set()
            self._thread.join(timeout=0.1)

    def run(self, job: Callable[[Tell], Iterator[Any]], pause: float = 0.0) -> Iterator[list[Any]]:
        """Yield what `job` yields and tells in the other thread; raise its exceptions here.

        Each list has everything that came since the last was taken, so a slow caller does not
        fall behind. `pause`: seconds from one list to the next.

        If the caller closes this generator, as for a page that is reloaded, the job stops
        after the pass under way.
        """
        turn = _Turn(job)
        self._turns.put(turn)
        try:
            while True:
                came = [turn.results.get()]
                while not turn.results.empty():
                    came.append(turn.results.get())
                end = came[-1][1]
                if results := [result for result, error in came if error is None]:
                    yield results
                if isinstance(end, StopIteration):
                    return
                if end is not None:
                    raise end
                time.sleep(pause)
        finally:
            turn.abandoned.set()
