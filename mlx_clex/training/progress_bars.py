"""Progress bars and rates of a run.

Not covered: losses and what else is reported.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from ..data.batch import Batch
from .batches import Batches


class Pace:
    """The bar of the training loop, and its rates without the time of validations."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        """Show the bar.

        Args:
            total: iterations of the whole run.
            done: iterations before this start of it.
            shown: False shows nothing, and still measures the rates.
        """
        self._bar = tqdm(total=total, initial=done, desc="Training", leave=False, disable=not shown)
        self._start()

    def step(self, tokens: int) -> None:
        """Count an iteration and its tokens."""
        self._iterations += 1
        self._tokens += tokens
        self._bar.update()

    def rates(self) -> tuple[float, float]:
        """Iterations and tokens per second since the last call."""
        seconds = time.perf_counter() - self._started
        found = self._iterations / seconds, self._tokens / seconds
        self._start()
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the rates."""
        before, on_bar = time.perf_counter(), time.time()
        yield
        self._started += time.perf_counter() - before
        if not self._bar.disable:
            passed = time.time() - on_bar
            self._bar.start_t += passed
            self._bar.last_print_t += passed

    def __enter__(self) -> "Pace":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _start(self) -> None:
        self._started = time.perf_counter()
        self._iterations = self._tokens = 0


def with_bar(batches: Batches, count: int, text: str, *, shown: bool = True) -> Iterable[Batch]:
    """Batches to evaluate, with a bar that is drawn before the first one is read.

    Args:
        batches: where they come from.
        count: how many at most; -1: all.
        text: what is done with them.
        shown: whether there is a bar.
    """
    total = len(batches.chosen(count))
    return tqdm(
        batches.some(count), total=total, desc=text, unit="batch", leave=False, disable=not shown
    )
