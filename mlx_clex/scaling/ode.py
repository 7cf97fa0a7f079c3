"""Solve an ODE by fixed-step Runge-Kutta of order four, the 3/8 rule.

The state may be an MLX array, which gives a differentiable result, or a NumPy array, which is
computed on the host in float64.

Not covered: adaptive steps. A caller chooses its own times, and may have the error estimated.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

Rhs = Callable[[Any, Any], Any]  # (time, state) -> d state / d time


def rk4_step(rhs: Rhs, time: Any, state: Any, step: Any) -> Any:
    """Return the state after one step of Kutta's 3/8 rule.

    Args:
        rhs: d state / d time as a function of (time, state).
        time: start of the step; a number or a scalar array.
        state: the state at `time`, any shape.
        step: length of the step, in units of time; a number or a scalar array.

    Returns:
        The state at `time + step`; its error falls 2^4 when the step halves
        (2^5 for this one step).

    Source: W. Kutta, Zeitschrift fuer Mathematik und Physik 46 (1901); the rule that
        torchdiffeq calls `rk4`.
    """
    third = step * (1 / 3)
    k1 = rhs(time, state)
    k2 = rhs(time + third, state + third * k1)
    k3 = rhs(time + 2 * third, state + step * k2 - third * k1)
    k4 = rhs(time + step, state + step * (k1 - k2 + k3))
    return state + step * ((k1 + 3 * (k2 + k3) + k4) * (1 / 8))


def solve(rhs: Rhs, state: Any, times: Iterable[Any]) -> Iterator[Any]:
    """Yield the state at each of `times`, one step of the 3/8 rule between neighbours.

    Args:
        rhs: d state / d time as a function of (time, state).
        state: the state at the first of `times`, which is yielded unchanged.
        times: increasing; numbers or scalar arrays.
    """
    times = iter(times)
    now = next(times)
    yield state
    for later in times:
        state = rk4_step(rhs, now, state, later - now)
        now = later
        yield state


def solve_with_error(
    rhs: Rhs, state: np.ndarray, times: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the state and an estimate of its error at every second one of `times`.

    A second solution with steps twice as long runs beside the first, as another row of the
    same arrays, so the estimate costs little more than the solution.

    Args:
        rhs: d state / d time; it must take a time of shape (2, 1) and a state of shape (2, N).
        state: the state at the first of `times`, (N,).
        times: increasing, an odd number of them.

    Yields:
        The state, (N,), and its error, (N,): the difference from the second solution / 15,
        since halving the step divides the error by 16.
    """
    fine = np.asarray(times, np.float64)
    # The second solution takes two steps at once, then one of length zero.
    coarse = np.concatenate([fine[:1], np.repeat(fine[2::2], 2)])
    both = np.stack([fine, coarse], axis=1)[:, :, None]
    for ours, theirs in islice(solve(rhs, np.stack([state, state]), both), 0, None, 2):
        yield ours, np.abs(ours - theirs) / 15
