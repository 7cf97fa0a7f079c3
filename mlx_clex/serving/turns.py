"""Run a conversation in one thread, for pages that are served from many.

MLX ties what it computes to a thread, so one thread loads and runs the model. It takes one
turn at a time.

Not covered: more than one conversation.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from .conversation import Conversation

# A function that sends something to the page at once, from inside a turn.
Tell = Callable[[Any], None]


def _tell(results: "queue.Queue[tuple[Any, Exception | None]]", told: Any) -> None:
    results.put((told, None))


class Turns:
    """Runs generators in the one thread that has the model."""

    def __init__(self, load: Callable[[], Callable[[], Conversation]]) -> None:
        """Start the thread and load there.

        Raises:
            InputError: the model cannot be loaded.
        """
        # None ends the thread.
        self._jobs: queue.Queue[tuple[Callable[[Tell], Iterator[Any]], queue.Queue[Any]] | None] = (
            queue.Queue()
        )
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
            while (work := self._jobs.get()) is not None:
                job, results = work
                try:
                    for result in job(partial(_tell, results)):
                        results.put((result, None))
                    results.put((None, StopIteration()))
                except Exception as error:
                    results.put((None, error))
        except Exception as error:
            loaded.put(error)
        finally:
            # MLX's streams of a thread that has ended can crash the interpreter's exit.
            mx.clear_streams()

    def close(self) -> None:
        """End the thread, after the pass under way."""
        self._jobs.put(None)
        while self._thread.is_alive():
            self.conversation.stop.set()
            self._thread.join(timeout=0.1)

    def run(self, job: Callable[[Tell], Iterator[Any]]) -> Iterator[Any]:
        """Yield what `job` yields and tells in the other thread; raise its exceptions here."""
        results: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        self._jobs.put((job, results))
        while True:
            result, error = results.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield result
