"""CLEX's solve: closed form, a finer float64 solve, the published code's answers."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_clex.errors import InputError
from mlx_clex.scaling.clex import NETWORK_BASE, Clex, ClexConfig
from mlx_clex.scaling.ode import solve

from ..conftest import GOLDEN, GOLDEN_NAMES

DIMS = 128
ACTS = {"tanh": np.tanh, "silu": lambda x: x / (1 + np.exp(-x))}


def trained_like(size, base=1e4, **fields):
    """Return a CLEX whose network changes frequencies at least as much as published ones."""
    clex = Clex(ClexConfig(**fields), dims=DIMS, base=base, trained_length=4096)
    spread = mx.random.uniform(-1, 1, clex.down_proj.shape, key=mx.random.key(2))
    clex.down_proj = spread * size / np.sqrt(clex.down_proj.shape[0])
    clex.up_proj = mx.random.uniform(-0.1, 0.1, clex.up_proj.shape, key=mx.random.key(1))
    return clex


def as_published(clex, step=0.01):
    """Return ln inv_freq at 1..max_factor by the original equations, float64, uniform steps."""
    i = np.arange(0, clex.dims, 2)
    d = clex.dims
    act = ACTS[clex.config.act]
    up, down = (np.array(w, np.float64) for w in (clex.up_proj, clex.down_proj))

    def rhs(t, z):
        log_n = -i / d * np.log(NETWORK_BASE * (2 * t - 1) ** (d / (d - 2)))
        return act((z + log_n) @ up) @ down - 2 * i / ((d - 2) * (2 * t - 1))

    z = -i / d * np.log(clex.base)
    rows = [z]
    steps = round(1 / step)
    for t in range(1, clex.config.max_factor):
        *_, z = solve(rhs, z, np.linspace(t, t + 1, steps + 1))
        rows.append(z)
    return np.array(rows)


@pytest.mark.parametrize("scale", [1.0, 2.0, 2.5, 16.0, 64.0])
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_untrained_it_is_ntk_by_twice_the_scale_less_one(scale, base):
    """With W_down = 0 the answer is closed form, and must be exact."""
    clex = Clex(ClexConfig(max_factor=64), dims=DIMS, base=base, trained_length=4096)
    i = np.arange(0, DIMS, 2)
    exact = base ** (-i / DIMS) * (2 * scale - 1) ** (-i / (DIMS - 2))

    assert np.abs(np.array(clex.inv_freq(scale)) / exact - 1).max() < 1e-7
    ours = np.array(clex.differentiable_inv_freq(scale))
    assert np.abs(ours / exact - 1).max() < 3e-6


def steep(act, up, down, **fields):
    """A CLEX with W_up `up` times its initial bound and W_down of standard deviation `down`."""
    clex = Clex(ClexConfig(act=act, **fields), dims=DIMS, base=1e4, trained_length=4096)
    hidden = clex.up_proj.shape[1]
    rng = np.random.default_rng(0)
    bound = up / np.sqrt(hidden)
    clex.up_proj = mx.array(rng.uniform(-bound, bound, clex.up_proj.shape), mx.float32)
    clex.down_proj = mx.array(rng.normal(0, down, clex.down_proj.shape), mx.float32)
    return clex


@pytest.mark.parametrize(
    ("act", "up", "down"),
    [("silu", 5, 0.003), ("silu", 5, 0.01), ("tanh", 5, 0.03), ("tanh", 1, 1)],
)
def test_steep_networks_are_solved_as_exactly(act, up, down):
    """With W_up five times its initial bound, fixed steps were off by 2.9e-6 and far more."""
    clex = steep(act, up, down, max_factor=12)
    fine = as_published(clex, step=0.001)
    checked = 0
    for scale, exact in enumerate(fine, 1):
        usable = exact < np.log(np.pi)  # faster pairs alias, and may be beyond any float
        with np.errstate(all="ignore"):
            ours = np.log(clex._solve(float(scale), 0))
        checked += usable.sum()
        assert np.abs(ours - exact)[usable & np.isfinite(ours)].max() < 1e-6, f"scale {scale}"
    assert checked > 300


def test_a_network_too_steep_to_solve_is_refused():
    """It gave frequencies with no correct digit."""
    clex = steep("silu", 300, 0.3, max_factor=4)
    with pytest.raises(InputError, match=r"at scale 4 cannot be computed: after .* uncertain by"):
        clex.inv_freq(4.0)
    assert np.isfinite(np.array(clex.inv_freq(1.0))).all(), "scale 1 needs no solve"


@pytest.mark.parametrize(
    ("act", "down", "max_factor", "bound"),
    [
        ("tanh", 0.01, 16, 5e-6),
        ("tanh", 0.03, 16, 2e-5),
        ("silu", 0.01, 16, 2e-5),
        ("tanh", 0.01, 64, 2e-5),
        ("silu", 0.003, 64, 2e-5),
    ],
)
def test_training_solves_large_scales_as_well(act, down, max_factor, bound):
    """16 equal steps to t = 64 were off by up to 1e-2: training fitted another curve."""
    clex = steep(act, 1, down, max_factor=max_factor)
    for scale in (2.0, max_factor / 2, float(max_factor)):
        ours = np.log(np.array(clex.differentiable_inv_freq(scale), np.float64))
        error = np.abs(ours - np.log(clex._solve(scale, 0))).max()
        assert error < bound, f"scale {scale}: {error:.1e}"


@pytest.mark.parametrize(("act", "size"), [("tanh", 0.3), ("silu", 0.1)])
@pytest.mark.parametrize(("base", "param_factor"), [(1e4, 1), (1e6, 2)])
def test_few_steps_are_as_good_as_hundreds(act, size, base, param_factor):
    """136 steps against 6,300: within 1e-6 in ln inv_freq, at every scale to 64.

    Networks of these sizes move ln inv_freq by 27 and more, far beyond published ones.
    """
    clex = trained_like(size, base=base, act=act, param_factor=param_factor, max_factor=64)
    fine = as_published(clex)
    ours = np.log([clex._solve(float(t), 0) for t in range(1, 65)])

    assert np.abs(ours - fine).max() < 1e-6
    moved = fine - np.log(
        np.array(Clex(clex.config, dims=DIMS, base=base, trained_length=4096)._solve(64.0, 0))
    )
    assert np.abs(moved).max() > 0.5, "the network must matter for this test to mean anything"


def test_other_reals_lie_between_whole_scales():
    """A fixed scale of 2.5 is solved on demand, with the same accuracy."""
    clex = trained_like(0.3, max_factor=16)
    i = np.arange(0, DIMS, 2)
    up, down = (np.array(w, np.float64) for w in (clex.up_proj, clex.down_proj))

    def rhs(t, z):
        log_n = -i / DIMS * np.log(NETWORK_BASE * (2 * t - 1) ** (DIMS / (DIMS - 2)))
        return np.tanh((z + log_n) @ up) @ down - 2 * i / ((DIMS - 2) * (2 * t - 1))

    *_, fine = solve(rhs, -i / DIMS * np.log(1e4), np.linspace(1, 2.5, 301))
    assert np.abs(np.log(np.array(clex.inv_freq(2.5), np.float64)) - fine).max() < 1e-6


@pytest.mark.parametrize("name", [n for n in GOLDEN_NAMES if n.startswith("clex")])
def test_frequencies_equal_those_of_the_published_code(name, converted):
    """Within 3e-5 relative, the error of the published float32 solve."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    golden = mx.load(str(GOLDEN / name / "golden.safetensors"))["frequencies"]
    tensors = mx.load(str(next(converted(name).glob("model*.safetensors"))))
    entry = {k: v for k, v in config["rope_scaling"].items() if k != "type"}
    clex = Clex(
        ClexConfig(**entry),
        dims=2 * golden.shape[1],
        base=config["rope_theta"],
        trained_length=config["max_position_embeddings"],
    )
    clex.take_weights(tensors)
    ours = mx.stack([clex.inv_freq(float(t)) for t in range(1, golden.shape[0] + 1)])

    assert mx.abs(ours / golden - 1).max().item() < 3e-5
    fine = np.exp(as_published(clex))
    assert np.abs(np.array(ours) / fine - 1).max() < 1e-6


def test_new_weights_are_solved_anew():
    """Frequencies of the old weights must not survive an update or a load."""
    clex = trained_like(0.3)
    before = np.array(clex.inv_freq(4.0))
    assert clex.inv_freq(4.0) is clex.inv_freq(4.0), "one solve serves all passes"

    clex.down_proj = clex.down_proj * 2
    after = np.array(clex.inv_freq(4.0))
    assert np.abs(after / before - 1).max() > 1e-3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_tensors_cast_by_apply_are_solved(dtype):
    """NumPy has no bfloat16, and MLX's way to cast a model is `apply`."""
    clex = trained_like(0.3)
    before = np.array(clex.inv_freq(4.0))
    clex.apply(lambda tensor: tensor.astype(dtype))
    assert np.abs(np.array(clex.inv_freq(4.0)) / before - 1).max() < 1e-2


def test_compiled_training_solves_any_scale_with_one_trace():
    """A scale drawn at each step must not be a constant of the compiled step."""
    clex = trained_like(0.3)
    traces = []

    def frequencies(scale):
        traces.append(scale)
        return clex.differentiable_inv_freq(scale)

    compiled = mx.compile(frequencies)
    for scale in (1.0, 2.0, 7.0, 16.0):
        error = mx.abs(compiled(mx.array(scale)) / clex.inv_freq(scale) - 1).max().item()
        assert error < 1e-5, f"scale {scale}: {error:.1e}"
    assert len(traces) == 1


def test_gradients_reach_both_matrices():
    """Against central differences in float64 of the host's solve."""
    clex = trained_like(0.3, max_factor=8)
    weight = np.linspace(0.5, 1.5, DIMS // 2)

    def loss(parameters):
        clex.update(parameters)
        logs = mx.log(clex.differentiable_inv_freq(5.0))
        return (logs * mx.array(weight, mx.float32)).sum()

    start = dict(clex.parameters())
    gradient = mx.grad(loss)(start)
    clex.update(start)
    for name in ("up_proj", "down_proj"):
        ours = np.array(gradient[name])
        row, column = np.unravel_index(np.abs(ours).argmax(), ours.shape)
        values = []
        for sign in (1, -1):
            moved = np.array(start[name])
            moved[row, column] += sign * 1e-3
            clex.update({**start, name: mx.array(moved)})
            values.append(float(np.log(clex._solve(5.0, 0)) @ weight))
            clex._solved = type(clex._solved)()
        theirs = (values[0] - values[1]) / 2e-3
        assert ours[row, column] == pytest.approx(theirs, rel=2e-3), name
