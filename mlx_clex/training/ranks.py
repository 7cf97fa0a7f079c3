"""The processes of one training run under mlx.launch.

Each process has the whole model and takes its rows of every batch; gradients are summed
(`step.py`). All processes must do the same things in the same order, or they wait for each
other for ever. So a failure or Ctrl-C in one of them is told to all. Only the first process
prints and writes.

Not covered: a model shared among processes (`model/sharding.py`); training has none.
"""

import contextlib
import json
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ..errors import InputError, RunError, watchdog_advice

_MEMORY = (
    "If memory was short: --grad-checkpoint, or, in a new run, a smaller --batch-size or "
    "--max-seq-length."
)


class Ranks:
    """This process among the others."""

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self.group = group
        self.size = group.size() if group else 1
        self.rank = group.rank() if group else 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def each(self, value: int) -> list[int]:
        """Return the value that each process gives, in their order; values below 2^31."""
        if self.size == 1:
            return [value]
        mine = mx.array([value])
        every: Any = mx.distributed.all_gather(mine, group=self.group, stream=mx.cpu).tolist()
        return every

    def check_same(self, settings: Any) -> None:
        """Refuse processes whose settings differ.

        Args:
            settings: of this process, as JSON.

        Raises:
            InputError: another process has other settings.
        """
        digest = zlib.crc32(json.dumps(settings, sort_keys=True).encode()) >> 1
        if len(set(self.each(digest))) > 1:
            raise InputError(
                "The processes do not have the same options, model, data and saves: give all of "
                "them the same files, and an --adapter-path that all of them see."
            )

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Report an error of the block once, if it happens in every process."""
        failure: Exception | None = None
        try:
            yield
        except (InputError, RunError, OSError) as error:
            failure = error
        if self.size == 1:
            if failure:
                raise failure
            return
        with self.running():
            failed = self.each(failure is not None)
        if failure and (self.first or not all(failed)):
            raise failure
        if any(failed):
            self._leave(2 if isinstance(failure, InputError) else 1)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Report a failure of the block once, if it ends every process.

        Raises:
            RunError: the run or MLX failed.
        """
        try:
            yield
        except RunError:
            if self.first:
                raise
            self._leave(1)
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise  # a subclass such as RecursionError is a mistake of ours
            advice = watchdog_advice(error, training=True) or f" {_MEMORY}"
            if self.size == 1:
                raise RunError(f"MLX failed: {error}.{advice}") from error
            raise RunError(
                f"Another process ended, and its own message says why; or MLX failed in process "
                f"{self.rank + 1} of {self.size}: {error}.{advice}"
            ) from error

    def _leave(self, status: int) -> None:
        """Exit without a message, once the process that prints one has done so.

        mlx.launch kills all processes when one of them has failed.
        """
        with contextlib.suppress(RuntimeError):
            self.each(0)
        sys.exit(status)
