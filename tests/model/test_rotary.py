"""Rotation: fused against plain, moved keys, gradients, and what bfloat16 loses."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_clex.errors import InputError
from mlx_clex.model.rotary import Pass, cos_sin, positions_from, rotate, rotate_at, rotate_by
from mlx_clex.model.scaled_model import make_prompt_cache
from mlx_clex.scaling import SCALINGS, build_scaling
from mlx_clex.scaling.ntk import Ntk

from ..conftest import CONFIGS, randomise, scaled_llama, tiny_llama
from ..oracle import turn

INV_FREQ = mx.array(10_000.0 ** -(np.arange(0, 32, 2) / 32), mx.float32)


def x(batch=2, heads=3, length=40, dims=32, dtype=mx.float32, seed=0):
    return mx.random.normal((batch, heads, length, dims), key=mx.random.key(seed)).astype(dtype)


def worst(a, b):
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [32, 48])
@pytest.mark.parametrize("offset", [0, 5, mx.array([2, 9])])
def test_fused_and_plain_rotation_are_the_same(traditional, dims, offset):
    """Inference uses the fused rotation; training and unequal rows use the plain one."""
    inputs = x(dims=dims)
    fused = rotate(inputs, INV_FREQ, offset, traditional=traditional)
    plain = rotate(inputs, INV_FREQ, offset, traditional=traditional, fused=False)

    assert worst(fused, plain) < 2e-5
    assert mx.array_equal(fused[..., 32:], inputs[..., 32:])
    assert mx.array_equal(plain[..., 32:], inputs[..., 32:])


@pytest.mark.parametrize("traditional", [False, True])
def test_base_frequencies_rotate_like_mlx(traditional):
    """At scale 1 the rotation must equal the model's own rope."""
    rope = nn.RoPE(32, traditional=traditional, base=10_000.0)

    assert worst(rotate(x(), INV_FREQ, 7, traditional=traditional), rope(x(), offset=7)) < 2e-5


def test_heads_and_rows_each_have_their_frequencies():
    """gene-param has frequencies per head, a batch of unequal rows per row."""
    by_head = mx.stack([INV_FREQ, INV_FREQ / 2, INV_FREQ / 5])
    heads = rotate(x(), by_head, 4)
    for head in range(3):
        assert worst(heads[:, head], rotate(x(), by_head[head], 4)[:, head]) < 2e-5

    by_row = mx.stack([INV_FREQ, INV_FREQ / 3])[:, None]
    offsets = mx.array([3, 11])
    rows = rotate_by(x(), *cos_sin(positions_from(offsets, 40), by_row))
    for row in range(2):
        alone = rotate(x()[row : row + 1], by_row[row, 0], offsets[row].item())
        assert worst(rows[row], alone[0]) < 2e-5


def test_given_positions_need_not_be_whole_or_consecutive():
    """Training draws positions, so a pass must accept any."""
    positions = mx.array([0, 2.5, 7, 100.25])
    one = Pass(inv_freq=[INV_FREQ], positions=positions).rotate(x(length=4), 0, 0, False)
    for i, position in enumerate(positions.tolist()):
        alone = rotate(x(length=4)[:, :, i : i + 1], INV_FREQ, mx.array(position), fused=False)
        assert worst(one[:, :, i : i + 1], alone) < 2e-5


@pytest.mark.parametrize(("old", "new"), [(1.0, 2.0), (2.0, 8.0), (8.0, 1.0)])
def test_moved_keys_equal_keys_rotated_fresh(old, new):
    """Stored keys must not remember the scale at which they were written."""
    ntk = Ntk(dims=64, base=10_000.0, trained_length=128)
    keys = mx.random.normal((1, 2, 300, 64), key=mx.random.key(0))  # (B, H, L, D)
    stored = rotate(keys, ntk.inv_freq(old))

    moved = rotate(stored, ntk.inv_freq(new) - ntk.inv_freq(old))

    error = mx.abs(moved - rotate(keys, ntk.inv_freq(new))).max().item()
    assert error < 1e-4, f"keys moved {old} -> {new} differ by {error:.1e}"


def test_a_pair_that_does_not_change_is_not_turned():
    """The fastest pair has the same frequency at every scale: its period is infinite."""
    still = mx.where(mx.arange(16) == 0, 0.0, INV_FREQ)
    for fused in (True, False):
        assert mx.array_equal(rotate(x(), still, 9, fused=fused)[..., 0], x()[..., 0])


def test_moves_in_bfloat16_round_once_each():
    """RMS error of unit-variance keys: after 15 moves at most 4 times that of one rotation."""
    clex = build_scaling(
        {"type": "clex", "max_factor": 16}, dims=128, base=1e4, trained_length=4096
    )
    keys = x(1, 1, 8192, 128)
    exact = turn(keys, clex.inv_freq(16.0))
    stored = rotate(keys.astype(mx.bfloat16), clex.inv_freq(1.0))
    for t in range(1, 16):
        stored = rotate(stored, clex.inv_freq(t + 1.0) - clex.inv_freq(float(t)))

    def rms(ours):
        return mx.sqrt(mx.mean((ours.astype(mx.float32) - exact) ** 2)).item()

    once = rms(rotate(keys.astype(mx.bfloat16), clex.inv_freq(16.0)))
    assert 1e-3 < once < 5e-3
    assert once < rms(stored) < 1.2e-2


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_plain_rotation_computes_in_float32(dtype):
    """In half precision an angle of 30,000 radians has no fraction left."""
    far = 30_000
    inputs = x(dtype=dtype)
    plain = rotate(inputs, INV_FREQ, far, fused=False)

    assert plain.dtype == dtype
    assert worst(plain, turn(inputs.astype(mx.float32), INV_FREQ, far)) < 0.04


def by_operations(x, inv_freq, positions, traditional):
    """The rotation in plain operations, whose gradient MLX derives."""
    angles = positions.reshape(-1, 1, positions.shape[-1], 1) * (
        inv_freq if inv_freq.ndim == 1 else inv_freq[..., None, :]
    )
    cos, sin = mx.cos(angles), mx.sin(angles)
    half = inv_freq.shape[-1]
    pairs, rest = x[..., : 2 * half].astype(mx.float32), x[..., 2 * half :]
    if traditional:
        a, b = pairs[..., 0::2], pairs[..., 1::2]
    else:
        a, b = pairs[..., :half], pairs[..., half:]
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = mx.stack([a, b], -1).flatten(-2) if traditional else mx.concatenate([a, b], -1)
    return mx.concatenate([turned.astype(x.dtype), rest], -1)


FREQUENCIES = {
    "one vector": INV_FREQ,
    "heads": mx.stack([INV_FREQ, INV_FREQ / 2, INV_FREQ / 5]),
    "rows": mx.stack([INV_FREQ, INV_FREQ / 3])[:, None],
    "rows and heads": mx.stack([INV_FREQ * k for k in (1, 2, 3, 4, 5, 6)]).reshape(2, 3, 16),
}
WRAPPERS = {"eager": lambda f: f, "compiled": mx.compile, "checkpointed": mx.checkpoint}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [32, 48])
@pytest.mark.parametrize("frequencies", FREQUENCIES)
def test_the_gradient_of_the_rotation_is_that_of_its_operations(
    frequencies, dims, traditional, wrapper
):
    """The rotation has a gradient of its own; that of the frequencies must be exact too."""
    inv_freq = FREQUENCIES[frequencies]
    rows = mx.sort(mx.random.uniform(0, 300, (2, 40), key=mx.random.key(1)), axis=-1)
    weight = x(dims=dims, seed=2)

    for positions in (rows[0], rows):

        def ours(inputs, inv_freq, positions=positions):
            return rotate_at(inputs, inv_freq, positions, traditional=traditional)

        def theirs(inputs, inv_freq, positions=positions):
            return by_operations(inputs, inv_freq, positions, traditional)

        gradients = []
        for turn_by in (WRAPPERS[wrapper](ours), theirs):

            def loss(*primals, turn_by=turn_by):
                return (mx.tanh(turn_by(*primals)) * weight).sum()

            gradients.append(mx.value_and_grad(loss, argnums=(0, 1))(x(dims=dims), inv_freq))
        (value, of_ours), (expected, of_theirs) = gradients
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        for our, their in zip(of_ours, of_theirs, strict=True):
            assert worst(our, their) < 1e-5 * mx.abs(their).max().item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_gradient_of_frequencies_is_summed_in_float32(dtype):
    """A sum of 3,000 positions in bfloat16 stops growing, and overflows in float16."""
    length = 3_000
    inputs, positions = x(1, 1, length, dtype=dtype), mx.arange(length, dtype=mx.float32)
    slow = mx.full((16,), 1e-3)

    def gradient(turn_by, inputs):
        def loss(inv_freq):
            return turn_by(inputs, inv_freq).astype(mx.float32).square()[..., :16].sum()

        return mx.grad(loss)(slow)

    ours = gradient(lambda a, f: rotate_at(a, f, positions), inputs)
    exact = gradient(lambda a, f: by_operations(a, f, positions, False), inputs.astype(mx.float32))
    assert ours.dtype == mx.float32
    assert worst(ours, exact) < 5e-3 * mx.abs(exact).max().item()


def test_the_gradient_keeps_no_tables():
    """Tables per head are as large as the keys; kept for each layer they doubled the memory."""
    heads, length, layers = 4, 512, 12
    inv_freqs = [mx.full((heads, 32), 0.01 * (i + 1)) for i in range(layers)]
    positions = mx.arange(length, dtype=mx.float32)
    inputs = x(1, heads, length, 64)

    def peak(turn_by):
        def loss(inv_freqs):
            out = inputs
            for inv_freq in inv_freqs:
                out = mx.tanh(turn_by(out, inv_freq))
            return out.sum()

        gradient = mx.grad(loss)
        mx.eval(inv_freqs, positions, inputs)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradient(inv_freqs))
        return (mx.get_peak_memory() - before) / inputs.nbytes

    ours = peak(lambda a, f: rotate_at(a, f, positions))
    plain = peak(lambda a, f: by_operations(a, f, positions, False))
    assert ours < 0.6 * plain, (ours, plain)


class FusedWithFrequenciesError(Exception):
    """`mx.fast.rope` was called with frequencies that carry a gradient."""


@pytest.mark.parametrize("name", [n for n in SCALINGS if SCALINGS[n].learned])
def test_training_never_hands_frequencies_to_the_fused_kernel(name, tokens, monkeypatch):
    """On the GPU mx.fast.rope has no gradient for them; on the CPU it has, so only this
    test would see the plain path removed."""
    model = scaled_llama(name)
    ids = tokens[:, :40]

    def loss(model):
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    fused = mx.fast.rope

    def refuse(*args, freqs=None, **kwargs):
        raise FusedWithFrequenciesError

    monkeypatch.setattr(mx.fast, "rope", refuse)
    model.train()
    value, gradients = nn.value_and_grad(model, loss)(model)
    ours = dict(gradients["scaling"].items())
    assert set(ours) == set(model.scaling.learned)
    assert all(mx.abs(gradient).max().item() > 0 for gradient in ours.values())

    # The guard must be able to fail: without learned tensors the fused kernel is used.
    model.scaling.freeze()
    if not model.scaling.by_layer:
        with pytest.raises(FusedWithFrequenciesError):
            model(ids)
    monkeypatch.setattr(mx.fast, "rope", fused)
    model.eval()
    assert loss(model).item() == pytest.approx(value.item(), abs=1e-5)


@pytest.mark.parametrize("name", [n for n in SCALINGS if SCALINGS[n].learned])
def test_generating_in_training_mode_solves_nothing_anew(name, tokens, monkeypatch):
    """After a fine-tune without eval(), every token cost a solve with gradients."""
    model = scaled_llama(name)
    expected = model(tokens[:1, :40])
    model.train()
    monkeypatch.setattr(type(model.scaling), "differentiable_inv_freq", None)
    assert mx.allclose(model(tokens[:1, :40], cache=make_prompt_cache(model)), expected, atol=1e-5)
    with pytest.raises(TypeError):
        model(tokens[:1, :40])


@pytest.mark.parametrize("name", [n for n in SCALINGS if SCALINGS[n].learned])
def test_gradients_of_the_loss_equal_differences(name, tokens):
    """Gradients pass from the loss through attention, rotation and solve."""
    model = scaled_llama(name)
    randomise(model.scaling, size=0.05)  # a smooth loss, for the differences
    ids = tokens[:1, :60]
    model.train()

    def loss(model):
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    model.eval()
    for tensor in model.scaling.learned:
        gradient = np.array(gradients["scaling"][tensor])
        index = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        start = np.array(model.scaling[tensor])
        losses = []
        for step in (2e-3, -2e-3):
            moved = start.copy()
            moved[index] += step
            model.scaling[tensor] = mx.array(moved)
            losses.append(loss(model).item())
        model.scaling[tensor] = mx.array(start)
        slope = (losses[0] - losses[1]) / 4e-3
        assert gradient[index] == pytest.approx(slope, rel=0.05), tensor


def test_a_rope_called_outside_a_pass_says_so(tokens):
    """Without a pass there is no scale; a guess would give wrong logits."""
    model = scaled_llama("clex")
    with pytest.raises(RuntimeError, match="Call the model instead"):
        model.model(tokens[:1])


def test_queries_get_the_gain_and_keys_do_not(tokens):
    """The first rope call of a layer has the queries; a second gain would square it."""
    plain, gained = scaled_llama("clex"), scaled_llama("clex", log_scale=True)
    ids = tokens[:1, :100]
    gain = gained.scaling.query_gain(None, 100, 1.0)
    assert gain == pytest.approx(np.log(100) / np.log(16))
    for layer in plain.layers:
        layer.self_attn.scale *= gain

    assert worst(plain(ids), gained(ids)) < 1e-4


def test_the_rotary_gain_of_half_precision_models_is_not_rounded():
    """bfloat16 would turn YaRN's 1.1386 into 1.1406, on queries and on keys."""
    for dims in (32, 48):
        keys = x(dtype=mx.bfloat16, dims=dims)
        ours = Pass(periods=1 / INV_FREQ, rotary_gain=1.1386).rotate(keys, 0, 0, False)
        plain = rotate(keys.astype(mx.float32), INV_FREQ)
        exact = mx.concatenate([1.1386 * plain[..., :32], plain[..., 32:]], axis=-1)
        bias = (ours.astype(mx.float32) * exact).sum() / (exact * exact).sum()
        assert abs(bias.item() - 1) < 4e-4


def test_left_padded_rows_rotate_their_own_tokens():
    """Positions below 0 are padding; positions from 0 on must be rotated correctly."""
    padded = rotate(x(), INV_FREQ, mx.array([-4, 0]))
    assert worst(padded[:1, :, 4:], rotate(x()[:1, :, 4:], INV_FREQ)) < 2e-5
    assert worst(padded[1:], rotate(x()[1:], INV_FREQ)) < 2e-5


@pytest.mark.parametrize("name", SCALINGS)
def test_the_gain_of_half_precision_models_is_not_rounded(name, tokens):
    """bfloat16 would round a gain of 1.66 to 1.6640625, the same for every token."""
    if "log_scale" not in SCALINGS[name].Config.__dataclass_fields__:
        with pytest.raises(InputError, match="log_scale"):
            scaled_llama(name, log_scale=True)
        return
    model = scaled_llama(name, log_scale=True)
    queries = x(dtype=mx.bfloat16)
    now = model._planner.begin(model, 100, None).now
    ours = now.gain(queries, 60)
    exact = model.scaling.query_gain(mx.arange(60, 100), 100, 1.0)
    exact = exact[:, None] if isinstance(exact, mx.array) else exact
    error = mx.abs(ours.astype(mx.float32) / (queries.astype(mx.float32) * exact) - 1).max()
    assert error.item() < 2**-8


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_one_length_share_the_fused_kernel(name, tokens, monkeypatch):
    """One vector for all heads and rows must mean one fused call, not a table."""
    model = scaled_llama(name)
    calls = []
    original = mx.fast.rope
    monkeypatch.setattr(
        mx.fast, "rope", lambda *a, **k: (calls.append(k["freqs"].shape), original(*a, **k))[1]
    )
    model(tokens[:, :10])

    per_head = SCALINGS[name].by_layer
    assert calls == ([] if per_head else [(16,)] * 2 * len(model.layers))


def test_randomised_networks_matter(tokens):
    """The learned tensors used above must change the answers, or the tests are empty."""
    model = scaled_llama("clex")
    before = model(tokens[:1, :100])
    randomise(model.scaling, size=0.0)
    assert worst(before, model(tokens[:1, :100])) > 1e-2
    assert worst(tiny_llama()(tokens[:1, :16]), model(tokens[:1, :16])) < 1e-4
