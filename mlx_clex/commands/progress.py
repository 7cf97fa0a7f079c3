"""The progress bar of reading a long prompt.

Not covered: bars of measurements and training, which count other things.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def reading_bar(total: int, *, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr at once, and yield a function that moves it.

    The rate is the mean since the bar appeared, the first pass of the model included.

    Args:
        total: tokens to read.
        enabled: False shows nothing.

    Yields:
        A callback for mlx-lm's `prompt_progress_callback`: (tokens read, tokens to read).
        At the end it closes the bar, so that the answer starts on a line of its own.
    """
    with tqdm(
        total=total, unit="tok", desc="Reading", smoothing=0, mininterval=0, disable=not enabled
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        yield progress
