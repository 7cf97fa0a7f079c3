"""Solve an ODE by fixed-step Runge-Kutta of order four, the 3/8 rule.

The state may be an MLX array, which gives a differentiable result, or a NumPy array, which is
computed on the host in float64.

Not covered: adaptive steps and error estimates; the caller chooses the times.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
