"""Scales and positions of training against the published code's tables."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_clex.errors import InputError
from mlx_clex.model.rotary import cos_sin, rotate_at
from mlx_clex.scaling import build_scaling
from mlx_clex.training.draws import (
    Draws,
    Procedure,
    gene_chances,
    release_positions,
)

from ..conftest import GOLDEN
from ..conftest import GOLDEN_NAMES as NAMES

CLEX = [name for name in NAMES if name.startswith("clex")]
GENE = [name for name in NAMES if name.startswith("gene")]
L0 = 64


def answers(name):
    return mx.load(str(GOLDEN / name / "golden.safetensors"))


def golden_scaling(name, converted):
    from mlx_clex import load

    return load(converted(name))[0].scaling


def make(name="clex", length=L0, seed=0, draw="uniform", sampling="release", share=0.25, **fields):
    entry = {"type": name, **fields}
    scaling = build_scaling(
        entry, dims=16, base=10_000.0, trained_length=L0, heads=2, key_heads=2, layers=1
    )
    procedure = Procedure(scale_draw=draw, sampling=sampling, plain_share=share)
    return Draws(scaling, procedure, np.random.default_rng(seed))


def chi_square(counts, chances):
    expected = np.asarray(chances) * sum(counts)
    return float((((np.asarray(counts) - expected) ** 2) / expected).sum())


@pytest.mark.parametrize("name", CLEX)
def test_released_clex_positions_give_the_released_table(name, converted):
    """train_tT_lenN_cos and _sin: positions, their last odd one included, and frequencies."""
    golden, scaling = answers(name), golden_scaling(name, converted)
    seen = 0
    for key in golden:
        if not key.endswith("_sampled_positions"):
            continue
        stem = key.removesuffix("_sampled_positions")
        t, length = (int(part.lstrip("tlen")) for part in stem.split("_")[1:])
        sample = np.array(golden[key])
        positions = release_positions(sample, length, t, scaling.trained_length)
        ours = cos_sin(mx.array(positions), scaling.differentiable_inv_freq(mx.array(float(t))))
        for table, wanted in zip(ours, ("_cos", "_sin"), strict=True):
            theirs = golden[stem + wanted][:, : scaling.dims // 2]
            error = mx.abs(table - theirs).max().item()
            # The release's own solve is 3e-5 off in the frequencies, times the position.
            assert error < 3e-5 * max(1.0, positions.max()), f"{stem}{wanted}: {error:.1e}"
        seen += 1
    assert seen == 5


def turned(positions, inv_freq):
    """Cosines and sines, (L, D/2) or (H, L, D/2), from the rotation with its own gradient."""
    shape = *inv_freq.shape[:-1], len(positions), inv_freq.shape[-1]
    # A pair (1, 0) turned by an angle is (its cosine, its sine).
    unit = mx.concatenate([mx.ones(shape), mx.zeros(shape)], axis=-1)
    rotated = rotate_at(unit.reshape(1, -1, *unit.shape[-2:]), inv_freq, positions)
    return mx.split(rotated.reshape(unit.shape), 2, axis=-1)


@pytest.mark.parametrize("name", CLEX)
def test_clex_gradients_are_the_released_ones(name, converted):
    """Gradients of sum(cotangent * table), through the rotation and every step of the solver."""
    golden, scaling = answers(name), golden_scaling(name, converted)
    seen = 0
    for key in golden:
        if not key.endswith("_cotangent"):
            continue
        stem = key.removesuffix("_cotangent")
        t, length = (int(part.lstrip("tlen")) for part in stem.split("_")[1:])
        sample = np.array(golden[stem + "_sampled_positions"])
        positions = mx.array(release_positions(sample, length, t, scaling.trained_length))
        cotangent = golden[key]

        def objective(up, down, t=t, positions=positions, cotangent=cotangent):
            before = scaling.up_proj, scaling.down_proj
            scaling.up_proj, scaling.down_proj = up, down
            tables = turned(positions, scaling.differentiable_inv_freq(mx.array(float(t))))
            scaling.up_proj, scaling.down_proj = before
            wide = [mx.concatenate([table, table], axis=-1) for table in tables]
            return (cotangent * mx.stack(wide)).sum()

        ours = mx.grad(objective, argnums=(0, 1))(scaling.up_proj, scaling.down_proj)
        for gradient, part in zip(ours, ("up", "down"), strict=True):
            theirs = golden[f"{stem}_grad_ode_{part}_proj"]
            error = (mx.abs(gradient - theirs).max() / mx.abs(theirs).max()).item()
            assert error < 1e-3, f"{stem} {part}: {error:.1e}"
        seen += 1
    assert seen == 4


@pytest.mark.parametrize("name", GENE)
def test_gene_tables_are_the_released_ones(name, converted):
    """train_sS_lenN: the multiple s times ceil(length / L0), positions 0, 1, 2, ..."""
    golden, scaling = answers(name), golden_scaling(name, converted)
    seen = 0
    for key in golden:
        if not (key.startswith("train_s") and key.endswith("_cos")):
            continue
        s, length = (int(part.lstrip("slen")) for part in key.split("_")[1:3])
        r = s * -(-length // scaling.trained_length)
        inv_freq = scaling.differentiable_inv_freq(float(r))
        ours = cos_sin(mx.arange(length).astype(mx.float32), inv_freq)
        for table, theirs in zip(ours, (golden[key], golden[key[:-3] + "sin"]), strict=True):
            half = theirs[..., : scaling.dims // 2].transpose(1, 0, 2)
            assert mx.abs(table - half).max().item() < 1e-4
        seen += 1
    assert seen == 3


def test_gene_param_gradients_are_the_released_ones(converted):
    """train_param_s2_*: both coefficients of the first layer, at length L0."""
    golden = answers("gene_param_llama")
    scaling = golden_scaling("gene_param_llama", converted)
    positions = mx.arange(scaling.trained_length).astype(mx.float32)
    names = ("base_coef", "specific_coef")
    before = [scaling[name] for name in names]

    def objective(*values):
        for name, value in zip(names, values, strict=True):
            scaling[name] = value
        tables = turned(positions, scaling.differentiable_inv_freq(2.0, 0))
        for name, value in zip(names, before, strict=True):
            scaling[name] = value
        wide = [mx.concatenate([t, t], axis=-1).transpose(1, 0, 2) for t in tables]
        return (golden["train_param_s2_cotangent"] * mx.stack(wide)).sum()

    ours = mx.grad(objective, argnums=(0, 1))(*before)
    for gradient, name in zip(ours, names, strict=True):
        theirs = golden[f"train_param_s2_grad_{name}"]
        error = (mx.abs(gradient[0] - theirs).max() / mx.abs(theirs).max()).item()
        assert error < 1e-3, f"{name}: {error:.1e}"
        assert mx.abs(gradient[1:]).max().item() == 0


@pytest.mark.parametrize("name", GENE)
def test_gene_probabilities_are_the_released_ones(name):
    """scale_pdf_lenN, for more and for fewer than five scales."""
    golden = answers(name)
    trained = 64 if name == "gene_llama" else 48
    keys = [key for key in golden if key.startswith("scale_pdf_len")]
    for key in keys:
        ours = gene_chances(8.0, int(key.removeprefix("scale_pdf_len")), trained)
        np.testing.assert_allclose(ours, np.array(golden[key]), atol=1e-6)
    assert len(keys) == 2


def test_uniform_draws_are_uniform():
    """A bound off by one would leave out scale 1 or the largest."""
    draws = make(max_factor=8)
    counts = np.bincount([int(draws.draw(L0).scale) for _ in range(4000)], minlength=9)[1:]
    assert chi_square(counts, np.full(8, 1 / 8)) < 24.3  # p = 0.001, 7 degrees


@pytest.mark.parametrize(("length", "step"), [(L0, 1), (2 * L0, 2), (L0 + 1, 2)])
def test_gene_draws_follow_its_chances(length, step):
    """r = s * ceil(length / L0), the ends drawn more often."""
    draws = make("gene", draw="gene", sampling="contiguous", factor=16.0)
    scales = np.array([draws.draw(length).scale for _ in range(4000)]) / step
    chances = gene_chances(16.0, length, L0)
    counts = np.bincount(scales.astype(int), minlength=len(chances) + 1)[1:]
    assert chi_square(counts, chances) < 37.7  # p = 0.001, 15 degrees


def test_gene_without_random_scale_stays_at_factor():
    """gene_random_scale false: r = factor always."""
    scaling = make("gene", draw="fixed", gene_random_scale=False, factor=8.0).scaling
    draws = Draws(scaling, scaling.procedure, np.random.default_rng(0))
    assert {draws.draw(L0).scale for _ in range(20)} == {8.0}


@pytest.mark.parametrize("multiple", [1, 2])
def test_release_positions_are_a_sorted_sample_with_forced_ends(multiple):
    """Each whole position is as likely as any other, and none comes twice."""
    draws, length = make(max_factor=4), multiple * L0
    hits = np.zeros(4 * length)
    for _ in range(3000):
        draw = draws.draw(length)
        s, t = multiple, int(draw.scale)
        assert draw.positions[0] == 0
        assert draw.positions[-1] == length * t // s - 1
        inner = draw.positions[1:-1] * s
        assert (np.diff(inner) > 0).all()
        assert inner.min() >= 1
        assert inner.max() <= length * t - 2
        if t == 4:
            hits[inner.round().astype(int)] += 1
    assert chi_square(hits[1:-1], np.full(4 * length - 2, 1 / (4 * length - 2))) < 4 * length * 1.3


def test_a_quarter_of_the_steps_on_long_sequences_is_plain():
    """Scale 1, rows of L0 tokens at 0..L0-1: the lengths that CLEX's own training loses."""
    draws = make(max_factor=8, sampling="skips", share=0.25)
    plain = [d for d in (draws.draw(3 * L0) for _ in range(2000)) if d.pieces == 3]
    assert chi_square([len(plain), 2000 - len(plain)], [0.25, 0.75]) < 10.8
    for draw in plain:
        assert draw.scale == 1
        np.testing.assert_array_equal(draw.positions, np.arange(L0))


@pytest.mark.parametrize(
    ("name", "released", "share"), [("clex", False, 0.25), ("clex", True, 0), ("gene", False, 0)]
)
def test_clex_alone_has_plain_steps_unasked(name, released, share):
    """In sequences longer than L0: shorter ones are at scale 1 often enough."""
    scaling = build_scaling({"type": name}, dims=16, base=1e4, trained_length=L0)
    procedure = scaling.released_procedure if released else scaling.procedure
    assert procedure.plain_share_at(2 * L0, L0) == share
    assert procedure.plain_share_at(L0, L0) == 0


@pytest.mark.parametrize("length", [64, 100, 128, 512])
def test_cream_reaches_from_one_end_to_the_other(length):
    """A head, a middle and a tail without gaps; the middle is most often in the middle."""
    draws = make(max_factor=8, sampling="cream", share=0)
    ends, befores = set(), []
    for _ in range(400):
        draw = draws.draw(length)
        span = max(length, int(L0 * draw.scale))
        positions = draw.positions.astype(int)
        assert (positions[0], positions[-1], len(positions)) == (0, span - 1, length)
        jumps = np.flatnonzero(np.diff(positions) != 1)
        assert (np.diff(positions) >= 1).all()
        assert len(jumps) <= 2
        if len(jumps) == 2:
            assert jumps[0] + 1 == length - 1 - jumps[1], "head and tail are equally long"
            ends.add(jumps[0] + 1)
            befores.append((positions[jumps[0] + 1] - jumps[0] - 1) / (span - length))
    if length < 512:
        assert ends == {length // 3, min(32, length // 3)}
        assert 0.45 < np.mean(befores) < 0.55
        assert np.std(befores) < 0.15
    else:
        assert not ends, "nothing is left out at the largest scale"


def test_skips_keep_neighbours_together_and_reach_far():
    """At most four runs, positions in order, all within L0 * t, half of them from 0."""
    draws = make(max_factor=8, sampling="skips")
    starts, furthest = [], 0.0
    for _ in range(2000):
        draw = draws.draw(L0)
        jumps = np.diff(draw.positions)
        assert (jumps >= 1).all()
        assert (jumps > 1).sum() <= 3
        assert draw.positions[-1] <= L0 * draw.scale - 1
        starts.append(draw.positions[0])
        furthest = max(furthest, draw.positions[-1] / (L0 * draw.scale - 1))
    assert furthest > 0.98
    assert 0.5 < np.mean(np.array(starts) == 0) < 0.7  # half, and those at scale 1


def test_the_same_state_draws_the_same():
    """Resuming restores the generator's state and nothing else."""
    draws = make(sampling="skips", seed=3)
    draws.draw(L0)
    state = draws.rng.bit_generator.state
    first = [draws.draw(L0) for _ in range(5)]
    draws.rng.bit_generator.state = state
    for one, two in zip(first, (draws.draw(L0) for _ in range(5)), strict=True):
        assert one.scale == two.scale
        np.testing.assert_array_equal(one.positions, two.positions)


@pytest.mark.parametrize("name", ["none", "linear", "ntk", "yarn"])
def test_methods_with_one_scale_are_never_drawn(name):
    """A drawn scale that inference never uses would be trained for nothing."""
    draws = make(name, draw="fixed", sampling="contiguous")
    assert draws.scaling.procedure == Procedure()
    assert draws.draw(L0).scale == draws.scaling.scale_at(L0)
    with pytest.raises(InputError, match="--scale-draw fixed"):
        make(name)


def test_defaults_and_the_papers_own():
    """--release-recipe must give CLEX's scattered positions."""
    clex = make().scaling
    assert clex.procedure.sampling == "cream"
    assert clex.released_procedure.sampling == "release"
    gene = make("gene", draw="gene", sampling="contiguous").scaling
    assert gene.procedure == gene.released_procedure


@pytest.mark.parametrize(
    ("settings", "length", "match"),
    [
        ({"max_factor": 4}, 5 * L0, "beyond 256 tokens"),
        ({"name": "gene", "draw": "gene", "sampling": "contiguous", "factor": 4.0}, 5 * L0, "256"),
        ({}, 2, "at least 4"),
    ],
)
def test_lengths_that_cannot_be_trained_are_refused(settings, length, match):
    """Found at the first draw, in the middle of loading, they would read like a crash."""
    with pytest.raises(InputError, match=match):
        make(**settings).check(length)
    make(**settings).check(L0)


def test_unknown_choices_are_refused():
    """A misspelt YAML value must not fall back to a default."""
    with pytest.raises(InputError, match="uniform, gene, fixed"):
        Procedure(scale_draw="random")
    with pytest.raises(InputError, match="release, skips, cream, contiguous"):
        Procedure(sampling="skip")
    with pytest.raises(InputError, match=r"within 0\.\.1"):
        Procedure(plain_share=1)


@pytest.mark.parametrize("length", [L0 + 1, 2 * L0, 2 * L0 + 32, 5 * L0])
def test_plain_rows_are_no_longer_than_the_trained_length(length):
    """127 tokens at scale 1 are positions that no text has at inference."""
    draws = make(length=length, sampling="skips", share=0.999)
    draw = draws.draw(length)
    assert draw.scale == 1
    assert len(draw.positions) <= L0
    assert len(draw.positions) == length // draw.pieces
    gene = make("gene", draw="gene", sampling="skips", share=0.999, factor=8)
    assert gene.draw(length).scale == 8, "the scale that such a text has at inference"
