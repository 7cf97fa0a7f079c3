"""The processes of one training run under mlx.launch.

Each has the whole model and takes its rows of every batch; gradients are summed
(`step.py`). All of them do the same things in the same order, or wait for each other for
ever: so what could differ, a failure or Ctrl-C, is asked of all. The first one speaks and
writes.

Not covered: a model shared out among processes (`sharding.py`), which training never is.
"""

import contextlib
import json
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ..errors import InputError, RunError

_MEMORY = (
    "If memory was short: --grad-checkpoint, or, in a new run, a smaller --batch-size or "
    "--max-seq-length."
)


class Ranks:
    """This process among the others; alone, without a group."""

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self.group = group
        self.size = group.size() if group else 1
        self.rank = group.rank() if group else 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def each(self, value: int) -> list[int]:
        """What every process gives here, in their order; below 2^31."""
        if self.size == 1:
            return [value]
        mine = mx.array([value])
        every: Any = mx.distributed.all_gather(mine, group=self.group, stream=mx.cpu).tolist()
        return every

    def check_same(self, settings: Any) -> None:
        """Refuse to go on with processes that would do different things.

        Args:
            settings: as JSON.

        Raises:
            InputError: they are not the same everywhere.
        """
        digest = zlib.crc32(json.dumps(settings, sort_keys=True).encode()) >> 1
        if len(set(self.each(digest))) > 1:
            raise InputError(
                "The processes do not have the same options, model, data and saves: give all of "
                "them the same files, and an --adapter-path that all of them see."
            )

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Within the block, what fails in every process is told by the first alone."""
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
        """Within the block, the first process alone tells of an end that all share.

        Raises:
            RunError: the run failed, or MLX.
        """
        try:
            yield
        except RunError:
            if self.first:
                raise
            self._leave(1)
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise  # RecursionError and the like are mistakes of ours
            if self.size == 1:
                raise RunError(f"MLX failed: {error}. {_MEMORY}") from error
            raise RunError(
                f"Another process ended, and its own message says why; or MLX failed in process "
                f"{self.rank + 1} of {self.size}: {error}. {_MEMORY}"
            ) from error

    def _leave(self, status: int) -> None:
        """End without a word, but not before those that have one to say.

        mlx.launch kills all processes when one of them has failed.
        """
        with contextlib.suppress(RuntimeError):
            self.each(0)
        sys.exit(status)
