"""The Runge-Kutta solver: its order, and problems with exact answers."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_clex.scaling.ode import rk4_step, solve, solve_with_error

# (right-hand side, state at 0, state at 1)
PROBLEMS = {
    "decay": (lambda t, y: -2 * y, 1.0, math.exp(-2)),
    "time alone": (lambda t, y: t * t * t * t, 0.0, 1 / 5),
    "logistic": (lambda t, y: y * (1 - y), 0.1, 1 / (1 + 9 * math.exp(-1))),
    "time and state": (lambda t, y: y * t, 1.0, math.exp(0.5)),
}


def error_with(steps, problem):
    rhs, start, exact = PROBLEMS[problem]
    *_, end = solve(rhs, np.float64(start), np.linspace(0, 1, steps + 1))
    return abs(end - exact)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_halving_the_step_divides_the_error_by_sixteen(problem):
    """A lower ratio is a solver of lower order: a wrong node or weight."""
    ratios = [error_with(n, problem) / error_with(2 * n, problem) for n in (8, 16)]

    assert all(14 < ratio < 19 for ratio in ratios), f"{problem}: {ratios}"


def test_cubics_in_time_are_integrated_exactly():
    """A rule of order four has no error below degree four."""
    end = rk4_step(lambda t, y: 4 * t**3 - 3 * t**2 + 2 * t - 1, 0.0, 0.0, 2.0)

    assert end == pytest.approx(2**4 - 2**3 + 2**2 - 2, abs=1e-12)


def test_it_is_the_three_eighths_rule():
    """One step on y' = t^4 distinguishes the rules of order four.

    The 3/8 rule gives (0 + 3/81 + 3 * 16/81 + 1) / 8 = 11/54, the classic rule 5/24.
    """
    assert rk4_step(lambda t, y: t**4, 0.0, 0.0, 1.0) == pytest.approx(11 / 54, abs=1e-15)


def test_mlx_arrays_give_what_numpy_gives():
    """The same code must serve training on the device and the solve at load."""
    w = np.random.default_rng(0).normal(size=(3, 3)) / 3
    times = np.linspace(0, 2, 9)
    ours = list(
        solve(lambda t, y: mx.tanh(y @ mx.array(w, mx.float32)), mx.ones(3), times.tolist())
    )
    theirs = list(solve(lambda t, y: np.tanh(y @ w), np.ones(3), times))

    assert len(ours) == len(theirs) == 9
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.array(a) - b).max() < 1e-6


def test_gradients_pass_through_every_step():
    """d/da of exp(a) is exp(a), to the accuracy of the solve."""

    def end(a):
        *_, y = solve(lambda t, y: a * y, mx.array(1.0), [k / 8 for k in range(9)])
        return y

    assert mx.grad(end)(mx.array(0.5)).item() == pytest.approx(math.exp(0.5), abs=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_estimated_error_is_the_true_one(problem):
    """CLEX stops refining by it: too small an estimate is a wrong answer."""
    rhs, start, exact = PROBLEMS[problem]
    times = np.linspace(0, 1, 17)
    pairs = list(solve_with_error(rhs, np.array([start]), times))
    plain = list(solve(rhs, np.float64(start), times))

    assert [state.item() for state, _ in pairs] == pytest.approx(plain[::2], abs=1e-15)
    state, error = (value.item() for value in pairs[-1])
    assert error == pytest.approx(abs(state - exact), rel=0.15)
