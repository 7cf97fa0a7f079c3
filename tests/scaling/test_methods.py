"""Laws that hold for every scaling, and its configuration's errors."""

import dataclasses
import itertools
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from mlx_clex.errors import InputError
from mlx_clex.model.rotary import rotate
from mlx_clex.scaling import SCALINGS, build_scaling
from mlx_clex.scaling.check import check_frequencies

from ..conftest import CONFIGS

DIMS, BASE, LENGTH = 64, 10_000.0, 4096
SHAPE = {"dims": DIMS, "base": BASE, "trained_length": LENGTH, "heads": 4, "layers": 2}
AT_4096 = {
    **CONFIGS,
    "gene": {"factor": 4, "training_seq_len": 8192},
    "gene-param": {"factor": 4, "training_seq_len": 8192},
}


def build(name, **fields):
    return build_scaling({"type": name, **AT_4096[name], **fields}, **SHAPE)


@pytest.mark.parametrize("name", SCALINGS)
def test_scale_one_gives_the_base_frequencies(name):
    """Fresh weights at scale 1 must be the model as it was."""
    base = BASE ** -(np.arange(0, DIMS, 2) / DIMS)
    inv_freq = np.array(build(name).inv_freq(1.0))

    assert inv_freq.dtype == np.float32
    assert np.abs(inv_freq / base - 1).max() < 2e-7


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "none"])
def test_no_pair_gets_faster_and_slow_pairs_stay_slow(name):
    """Stretching must keep the order of the pairs, and slow the slowest one most."""
    scaling = build(name)
    base = np.array(scaling.inv_freq(1.0), np.float64)
    scaled = np.array(scaling.inv_freq(8.0), np.float64)

    assert (scaled <= base * (1 + 1e-6)).all()
    assert (np.diff(scaled, axis=-1) < 0).all()
    assert (scaled / base)[..., -1].max() < 0.2


@pytest.mark.parametrize("name", SCALINGS)
def test_scale_never_falls_with_length(name):
    """A longer text must never be read at a smaller scale."""
    scaling = build(name)
    scales = [scaling.scale_at(n) for n in range(1, 20 * LENGTH, 97)]

    assert all(a <= b for a, b in itertools.pairwise(scales))
    assert all(isinstance(scale, float) for scale in scales)
    assert scaling.static == (len(set(scales)) == 1)


@pytest.mark.parametrize("name", SCALINGS)
def test_keys_move_at_most_once_in_256_tokens(name):
    """Each rotation to a new scale rounds the cached keys; in bfloat16 the errors add up."""
    scaling = build(name)
    steps = [n for n in range(2, 12 * LENGTH) if scaling.scale_at(n) != scaling.scale_at(n - 1)]

    assert all(b - a >= 256 for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("name", SCALINGS)
def test_trained_frequencies_equal_those_of_inference(name):
    """Otherwise training would fit other frequencies than generation uses."""
    scaling = build(name)
    for index, tensor in enumerate(scaling.learned):
        shape = scaling[tensor].shape
        scaling[tensor] = mx.random.uniform(-0.05, 0.05, shape, key=mx.random.key(index))
    for scale in (1.0, 2.0, 3.5, 16.0):
        ours = scaling.differentiable_inv_freq(scale, layer=1)
        error = mx.abs(mx.log(ours) - mx.log(scaling.inv_freq(scale, layer=1))).max().item()
        assert error < 1e-5, f"{name} at scale {scale}: {error:.1e}"


@pytest.mark.parametrize("name", SCALINGS)
def test_weights_survive_a_checkpoint(name):
    """Tensors go out under the documented names and come back bit for bit, in float32."""
    one = build(name)
    weights = {
        key: mx.random.normal(shape, key=mx.random.key(3)).astype(mx.bfloat16)
        for key, shape in one.weight_shapes().items()
    }
    two = build_scaling({"type": name, **AT_4096[name]}, **SHAPE, weights=weights)

    for key in weights:
        mine = two[key.removeprefix("scaling.")]
        assert mine.dtype == mx.float32
        assert mx.array_equal(mine, weights[key].astype(mx.float32))
    names = {
        "clex": ["up_proj", "down_proj"],
        "gene-param": ["base_coef", "specific_coef"],
    }
    assert list(weights) == ["scaling." + n for n in names.get(name, [])]


@pytest.mark.parametrize(
    ("name", "theirs", "scale"),
    [
        ("none", {"type": "default"}, 1.0),
        ("linear", {"type": "linear", "factor": 4.0}, 4.0),
        (
            "yarn",
            {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": LENGTH},
            8.0,
        ),
    ],
)
def test_baselines_equal_those_of_mlx_lm(name, theirs, scale):
    """Each method must equal mlx-lm's, gains included, or comparisons are meaningless."""
    x = mx.random.normal((1, 2, 33, DIMS), key=mx.random.key(0))
    fields = {"factor": scale} if name != "none" else {}
    scaling = build_scaling({"type": name, **fields}, **SHAPE)
    ours = rotate(x, scaling.inv_freq(scale)) * scaling.rotary_gain(scale)

    assert mx.abs(ours - initialize_rope(DIMS, BASE, False, theirs, LENGTH)(x)).max() < 1e-5


@pytest.mark.parametrize("length", [LENGTH, 8192, 5 * LENGTH])
def test_dynamic_equals_that_of_mlx_lm_at_whole_steps(length):
    """At a step both are equal; between steps mlx_clex uses the next step."""
    scaling = build("dynamic")
    growth = scaling.config.factor * length / LENGTH - (scaling.config.factor - 1)
    theirs = (BASE * growth ** (DIMS / (DIMS - 2))) ** -(np.arange(0, DIMS, 2) / DIMS)

    ours = np.array(scaling.inv_freq(scaling.scale_at(length)))
    assert np.abs(ours / theirs - 1).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("dynamic", {"rope_type": "dynamic", "factor": 2.0}),
        ("yarn", {"rope_type": "yarn", "factor": 8.0}),
    ],
)
def test_baselines_equal_those_of_transformers(name, entry):
    """Frequencies and gains must equal those of transformers for the same entry."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=4 * DIMS,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rope_parameters={**entry, "rope_theta": BASE, "original_max_position_embeddings": LENGTH},
    )
    length = 4 * LENGTH
    kwargs = {"seq_len": length} if name == "dynamic" else {}
    if name == "linear":
        from transformers.modeling_rope_utils import _compute_linear_scaling_rope_parameters

        theirs, gain = _compute_linear_scaling_rope_parameters(config, torch.device("cpu"))
    else:
        theirs, gain = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), **kwargs)
    scaling = build_scaling({"type": name, "factor": entry["factor"]}, **SHAPE)
    scale = scaling.scale_at(length)

    assert np.abs(np.array(scaling.inv_freq(scale)) / theirs.numpy() - 1).max() < 1e-6
    assert scaling.rotary_gain(scale) == pytest.approx(gain, abs=1e-6)


def test_gene_stretches_as_its_paper_says_for_llama_2():
    """Base 1e4, D 128, L0 4096: the first pair stretched in full is number 38."""
    gene = build_scaling({"type": "gene"}, dims=128, base=1e4, trained_length=4096)
    stretch = np.log(np.array(gene.inv_freq(1.0)) / np.array(gene.inv_freq(math.e)))

    assert np.allclose(stretch[38:], 1, atol=1e-4)
    assert np.allclose(stretch[:38], np.arange(38) / 38, atol=1e-4)


def test_reach_is_what_the_method_promises():
    """`doctor`, `chat`, pictures and cards told five different lengths for GeNE."""
    reaches = {name: build(name).reach for name in SCALINGS}

    assert reaches == {
        "none": LENGTH,
        "linear": 4 * LENGTH,
        "ntk": 4 * LENGTH,
        "yarn": 4 * LENGTH,
        "yarn-t": 4 * LENGTH,
        "dynamic": None,
        "clex": 20 * LENGTH,
        "gene": 4 * LENGTH,
        "gene-param": 4 * LENGTH,
    }
    assert [name for name in SCALINGS if build(name).hard_reach] == ["clex"]


def test_log_scale_of_clex_is_one_number_a_pass():
    """ln n / ln L0, below 1 for short texts and 0 for a single token."""
    clex = build("clex", log_scale=True)

    assert clex.query_gain(None, LENGTH, 1.0) == pytest.approx(1)
    assert clex.query_gain(None, LENGTH**2, 1.0) == pytest.approx(2)
    assert clex.query_gain(None, 1, 1.0) == 0
    assert build("clex").query_gain(None, LENGTH, 1.0) is None


def test_log_gain_of_clex_is_that_of_the_longest_text_of_its_scale():
    """ln (t L0) / ln L0 for every text of scale t, so 1 within L0."""
    clex = build("clex", log_gain=True)

    assert clex.gain_follows == "scale"
    assert clex.query_gain(None, 1, 1.0) == clex.query_gain(None, LENGTH, 1.0) == 1
    assert clex.query_gain(None, LENGTH + 1, 2.0) == clex.query_gain(None, 2 * LENGTH, 2.0)
    same = build("clex", log_scale=True).query_gain(None, 5 * LENGTH, 5.0)
    assert clex.query_gain(None, 4 * LENGTH + 3, 5.0) == same
    with pytest.raises(InputError, match="log_scale and log_gain exclude each other"):
        build("clex", log_scale=True, log_gain=True)


def test_log_scale_of_gene_is_one_number_a_position():
    """max(1, ln m / ln training_seq_len), m counted from 1."""
    gene = build("gene", log_scale=True)
    gain = gene.query_gain(mx.array([0, 8191, 8192**2 - 1]), 0, 1.0)

    assert np.allclose(np.array(gain), [1, 1, 2], atol=1e-5)
    assert build("gene").query_gain(mx.array([5]), 6, 1.0) is None


def test_yarn_t_is_yarn_at_the_scale_of_the_text():
    """Frequencies and the gain on scores equal those of yarn made for that length."""
    following = build("yarn-t")
    for scale in (1.0, 2.0, 7.0):
        fixed = build_scaling({"type": "yarn", **AT_4096["yarn"], "factor": scale}, **SHAPE)
        assert following.scale_at(int(scale * LENGTH)) == scale
        assert mx.array_equal(following.inv_freq(scale), fixed.inv_freq(scale))
        gain = following.query_gain(None, 0, scale) * following.rotary_gain(scale) ** 2
        assert gain == pytest.approx(fixed.rotary_gain(scale) ** 2)


# What was given, and what the message must name.
BAD = [
    ({"type": "banana"}, ["banana", "clex", "gene-param"]),
    ({"type": ["clex"]}, ["['clex']", "gene-param"]),
    ("clex", ["an entry such as", "'clex'"]),
    (None, ["an entry such as", "None"]),
    ({"type": "clex", "max_facter": 16}, ["max_facter", "max_factor", "param_factor"]),
    ({"type": "clex", "max_factor": 0}, ["max_factor", "0"]),
    ({"type": "clex", "max_factor": 2.5}, ["max_factor", "whole number", "2.5"]),
    ({"type": "clex", "max_factor": float("nan")}, ["max_factor", "whole number", "nan"]),
    ({"type": "gene", "factor": float("inf")}, ["factor", "number", "inf"]),
    ({"type": "clex", "max_factor": True}, ["max_factor", "True"]),
    ({"type": "clex", "param_factor": 0}, ["param_factor", "0"]),
    ({"type": "clex", "act": "relu"}, ["act", "relu", "tanh", "silu"]),
    ({"type": "clex", "time_dt": 0}, ["time_dt"]),
    ({"type": "linear", "factor": 0.5}, ["factor", "0.5"]),
    ({"type": "linear", "factor": "4"}, ["factor", "number", "'4'"]),
    ({"type": "yarn", "beta_fast": 1, "beta_slow": 2}, ["beta_fast", "beta_slow"]),
    ({"type": "gene", "factor": 2, "training_seq_len": 16384}, ["factor", "16384", "4"]),
    ({"type": "gene", "num_rotations": 0}, ["num_rotations"]),
    ({"type": "none", "factor": 2}, ["factor", "no keys"]),
]


@pytest.mark.parametrize(("entry", "words"), BAD)
def test_a_bad_entry_is_refused_with_what_to_change(entry, words):
    """A misspelt or impossible setting must never fall back to a default."""
    with pytest.raises(InputError) as error:
        build_scaling(entry, **SHAPE)

    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"heads": "4"}, "heads must be a whole number of at least 1, got '4'"),
        ({"layers": 0}, "layers must be a whole number of at least 1, got 0"),
        ({"gain": 0.0}, "gain of the base rope must be greater than 0, got 0.0"),
        ({"gain": math.nan}, "got nan"),
        ({"inv_freq": [0.0] * (DIMS // 2)}, "inv_freq must be finite and above 0, got 0.0"),
        ({"inv_freq": [math.inf] * (DIMS // 2)}, "above 0, got inf"),
        ({"base": 10**400}, "rope_theta must be"),
    ],
)
def test_a_rope_that_cannot_be_is_refused(shape, words):
    """The message blamed the learned tensors, or was MLX's."""
    with pytest.raises(InputError, match=words):
        build_scaling({"type": "clex"}, **(SHAPE | shape))


@pytest.mark.parametrize("dims", [2, 7, 0])
def test_odd_or_too_few_dimensions_are_refused(dims):
    """Pairs need an even number, and the exponents of NTK and CLEX at least four."""
    with pytest.raises(InputError, match="even and at least 4"):
        build_scaling({"type": "none"}, dims=dims, base=BASE, trained_length=LENGTH)


def test_grouped_key_heads_are_refused_by_gene_param():
    """gene-param has frequencies for every query head, but a grouped key has one rotation."""
    with pytest.raises(InputError, match=r"as many key heads.*2 and 4.*Use gene"):
        build_scaling({"type": "gene-param"}, **SHAPE, key_heads=2)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"up_proj": (32, 64)}, ["lacks", "scaling.down_proj"]),
        ({"up_proj": (32, 128), "down_proj": (128, 32)}, ["up_proj", "(32, 128)", "(32, 64)"]),
        ({"up_proj": (32, 64), "down_proj": (64, 32), "extra": (1,)}, ["scaling.extra"]),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, words):
    """param_factor 1 with weights of param_factor 2, a missing or an unknown tensor."""
    given = {"scaling." + name: mx.zeros(shape) for name, shape in weights.items()}
    with pytest.raises(InputError) as error:
        build_scaling({"type": "clex"}, **SHAPE, weights=given)

    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", SCALINGS)
def test_fixed_scales_are_checked(name):
    """A scale out of range must be refused with the range."""
    scaling = build(name)
    for bad in (0.5, float("nan"), float("inf"), -1.0, 0, "2"):
        for use in (scaling.check_scale, scaling.inv_freq):
            with pytest.raises(InputError, match=r"(?i)scale"):
                use(bad)
    assert scaling.check_scale(1) == 1.0
    if name == "clex":
        assert scaling.check_scale(2.5) == 2.5
        for use in (scaling.check_scale, scaling.inv_freq):
            with pytest.raises(InputError, match=r"1\.\.20"):
                use(20.5)


@pytest.mark.parametrize("name", SCALINGS)
def test_defaults_live_in_the_dataclass(name):
    """The table, the config class and its defaults must agree without any argument."""
    scaling = SCALINGS[name](**SHAPE)

    assert scaling.config == SCALINGS[name].Config()
    assert dataclasses.is_dataclass(scaling.config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in SCALINGS if SCALINGS[name].learned])
def test_learned_tensors_that_are_not_finite_are_refused_by_name(name, value):
    """NaN in a checkpoint's scaling tensors was loaded, and every logit was NaN."""
    scaling = build(name)
    weights = {key: mx.zeros(shape) for key, shape in scaling.weight_shapes().items()}
    damaged = list(weights)[-1]
    weights[damaged] = mx.where(mx.arange(weights[damaged].size) == 3, value, 0.0).reshape(
        weights[damaged].shape
    )

    with pytest.raises(InputError, match=f"{damaged} has values that are not finite"):
        scaling.take_weights(weights)


@pytest.mark.parametrize(
    ("name", "fields", "weights", "words"),
    [
        ("clex", {}, {"down_proj": 1e3}, "of clex at scale 8 .*scaling.down_proj 1e.03"),
        ("gene-param", {}, {"base_coef": -200}, "of gene-param at scale 8 .*base_coef 200"),
    ],
)
def test_frequencies_that_are_not_finite_are_refused(name, fields, weights, words):
    """They were infinite or NaN, and the text that followed was noise."""
    scaling = build(name, **fields)
    for tensor, value in weights.items():
        scaling[tensor] = mx.full(scaling[tensor].shape, value)

    with pytest.raises(InputError, match=words):
        scaling.inv_freq(scaling.check_scale(8.0) if name != "ntk" else scaling.scale_at(1))


def test_a_gain_that_is_not_finite_is_refused():
    """A method's gain multiplies every query: NaN there is NaN in every logit."""

    class Endless(SCALINGS["linear"]):
        def rotary_gain(self, scale):
            return math.inf

    scaling = Endless(dims=DIMS, base=BASE, trained_length=LENGTH)
    with pytest.raises(InputError, match=r"gain of linear at scale 4 is not finite"):
        scaling.inv_freq(4.0)


@pytest.mark.parametrize("name", SCALINGS)
def test_usual_frequencies_bring_no_warning(name):
    """A warning at each load of a sound model would be ignored soon."""
    assert check_frequencies(build(name), strict=True) is None


@pytest.mark.parametrize(
    ("pair", "value", "words"),
    [
        (0, -2.0, "pair 0 turns 7.39 radians per token .* at scale 4;? ?"),
        (31, 200.0, "pair 31 is too slow for float32 and does not turn at scale 4"),
        (9, -1.0, "pair 9 is faster than pair 8 at scale 4"),
    ],
)
def test_suspicious_learned_frequencies_are_told(pair, value, words):
    """They are finite, so nothing else notices them, and the answers are garbage."""
    scaling = build("gene-param")
    scaling.base_coef = mx.where(mx.arange(DIMS // 2) == pair, value, scaling.base_coef)

    message = check_frequencies(scaling, strict=True) or ""
    assert re.search(words, message), message
    assert "of gene-param are suspicious" in message


@pytest.mark.parametrize(("speed", "told"), [(0.99 * math.pi, False), (1.01 * math.pi, True)])
def test_pairs_that_alias_are_told_at_load_too(speed, told):
    """Above pi radians per token a pair cannot be told from a slower one."""
    scaling = build("gene-param")
    fresh = scaling.inv_freq(scaling.scale_at(1))[0, 0].item()
    scaling.base_coef = mx.where(
        mx.arange(DIMS // 2) == 0, math.log(fresh / speed), 0.0
    ) + mx.zeros_like(scaling.base_coef)
    message = check_frequencies(scaling, scaling.scale_at(1))
    assert ("above pi it aliases" in (message or "")) is told
