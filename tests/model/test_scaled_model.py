"""attach: changes in a stock model, and models that it refuses."""

import importlib
import inspect
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as stock_make_prompt_cache
from mlx_lm.utils import does_model_support_input_embeddings

from mlx_clex import attach, make_prompt_cache
from mlx_clex.errors import InputError
from mlx_clex.model.cache import ScaledKVCache
from mlx_clex.model.planner import given_pass
from mlx_clex.model.rotary import Pass, Rope, rotate
from mlx_clex.scaling import SCALINGS

from ..conftest import CONFIGS, L0, randomise, scaled_llama, tiny_llama


def worst(a, b):
    return mx.abs(a - b).max().item()


@pytest.mark.parametrize("name", SCALINGS)
def test_at_scale_one_the_model_is_the_one_it_was(name, tokens):
    """An untrained scaling fixed at scale 1 must not change the logits."""
    ids = tokens[:, :L0]
    stock = tiny_llama()(ids)
    model = attach(tiny_llama(), {"type": name, **CONFIGS[name]}, scale=1.0)

    assert worst(model(ids), stock) < 1e-4


def test_it_works_in_place_and_keeps_the_class(tokens):
    """mlx-lm looks at classes, signatures and attributes; all of them must be there."""
    model = tiny_llama()
    attached = attach(model, {"type": "clex"})

    assert attached is model
    assert isinstance(model, llama.Model)
    assert type(model).__name__ == "Model"
    assert type(model).__module__ == "mlx_lm.models.llama"
    assert inspect.signature(model.__call__) == inspect.signature(tiny_llama().__call__)
    assert does_model_support_input_embeddings(model)
    assert all(isinstance(layer.self_attn.rope, Rope) for layer in model.layers)
    assert len(model.layers) == 2
    assert type(attach(tiny_llama(), {"type": "gene"})) is type(model), "one class a family"


@pytest.mark.parametrize("length", [0, 1, 16.5, float("nan"), 1e30, "16", [16]])
def test_a_trained_length_that_is_none_is_refused(length):
    """0 was taken for None, and fractions gave a reach of half a token."""
    with pytest.raises(InputError, match="whole number of at least 2 tokens"):
        attach(tiny_llama(), {"type": "clex"}, trained_length=length)
    assert attach(tiny_llama(), {"type": "clex"}, trained_length=np.int64(16)).reach == 16 * L0


@pytest.mark.parametrize("length", [-1, 5.5, "5"])
def test_an_expected_length_that_is_none_is_refused(length):
    """A cache took it, and could not be saved."""
    with pytest.raises(InputError, match="whole number of at least 0"):
        make_prompt_cache(tiny_llama(), length)
    (cache, _) = make_prompt_cache(scaled_llama("clex"), np.int64(40))
    assert type(cache.expected_length) is int


def test_what_is_no_model_is_refused():
    """`load` returns two things, and both are soon given."""
    both = (tiny_llama(), None)
    for call in (make_prompt_cache, lambda model: attach(model, {"type": "clex"})):
        with pytest.raises(InputError, match="A model of mlx-lm is needed, got tuple"):
            call(both)


def test_input_embeddings_stand_in_for_tokens(tokens):
    """The length of the pass comes from the tokens or the embeddings."""
    model = scaled_llama("clex")
    ids = tokens[:1, :70]
    embeddings = model.model.embed_tokens(ids)

    assert worst(model(ids), model(ids, input_embeddings=embeddings)) < 1e-6
    assert worst(model(ids), model(mx.zeros((1, 0)), input_embeddings=embeddings)) < 1e-6
    assert worst(model(ids), model(inputs=ids)) < 1e-6


def test_the_weights_appear_once_and_by_their_name():
    """Shared by all layers, they must be saved once, where the converter looks for them."""
    clex = dict(tree_flatten(scaled_llama("clex").parameters()))
    assert [k for k in clex if "proj" in k and "layers" not in k] == [
        "scaling.up_proj",
        "scaling.down_proj",
    ]
    stock = dict(tree_flatten(tiny_llama().parameters()))
    assert clex.keys() - stock.keys() == {"scaling.up_proj", "scaling.down_proj"}
    param = dict(tree_flatten(scaled_llama("gene-param").parameters()))
    assert param["scaling.base_coef"].shape == (2, 4, 16)


def test_a_second_scaling_takes_the_place_of_the_first(tokens):
    """Comparing methods on the same weights attaches one after the other."""
    ids = tokens[:1, :100]
    model = scaled_llama("clex")
    attach(model, {"type": "gene", "factor": 4})
    once = attach(tiny_llama(), {"type": "gene", "factor": 4})

    assert worst(model(ids), once(ids)) < 1e-6
    assert not [k for k, _ in tree_flatten(model.parameters()) if k.startswith("scaling.up")]
    assert isinstance(make_prompt_cache(model)[0], ScaledKVCache)


def test_mlx_lm_gets_our_caches_from_its_own_function():
    """Stock programs call mlx_lm's make_prompt_cache and must get caches with a scale."""
    model = scaled_llama("clex")
    assert [type(c) for c in stock_make_prompt_cache(model)] == [ScaledKVCache] * 2
    assert [type(c) for c in make_prompt_cache(tiny_llama())] == [KVCache] * 2
    fixed = scaled_llama("clex", scale=4.0)
    assert [type(c) for c in stock_make_prompt_cache(fixed)] == [KVCache] * 2


def test_the_scale_can_be_fixed_at_any_number(tokens):
    """CLEX: any real up to max_factor, also below the scale the length asks for."""
    ids = tokens[:1, :40]
    model = scaled_llama("clex", scale=2.5)
    other = scaled_llama("clex")
    other.scaling.scale_at = lambda length: 2.5

    assert worst(model(ids), other(ids)) < 1e-6
    assert model.reach == 20 * L0
    assert scaled_llama("linear", scale=8.0).reach == 8 * L0
    with pytest.raises(InputError, match=r"1\.\.20"):
        scaled_llama("clex", scale=21.0)
    with pytest.raises(InputError, match="no scale to set"):
        scaled_llama("none", scale=2.0)


def test_the_gain_of_a_fixed_scale_is_that_of_its_length(tokens):
    """log_scale at a fixed T is ln(T * L0) / ln L0 for every token."""
    fixed = scaled_llama("clex", log_scale=True, scale=4.0)
    growing = scaled_llama("clex", log_scale=True)
    cache = make_prompt_cache(growing, expected_length=4 * L0)

    assert worst(fixed(tokens[:1, :50]), growing(tokens[:1, :50], cache=cache)) < 1e-4


def test_beyond_a_hard_reach_the_model_refuses(tokens):
    """The published code fails there with an index error."""
    model = scaled_llama("clex")
    ids = mx.concatenate([tokens[:1], tokens[:1]], axis=1)
    model(ids[:, :320])
    with pytest.raises(ValueError, match=r"321 tokens.* reaches 320 \(.*max_factor 20\)"):
        model(ids[:, :321])
    cache = make_prompt_cache(model)
    model(ids[:, :320], cache=cache)
    with pytest.raises(InputError, match="321 tokens"):
        model(ids[:, :1], cache=cache)
    model(ids[:, :10]), "and goes on serving"


@pytest.mark.parametrize("name", ["none", "linear", "ntk", "yarn"])
def test_past_a_soft_reach_it_warns_once(name, tokens):
    """Longer sequences run, but answers get worse, so the user needs a warning."""
    model = scaled_llama(name)
    ids = tokens[:1, : model.reach]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
        with pytest.raises(UserWarning, match=f"past the {model.reach} "):
            model(tokens[:1, : model.reach + 1])
        model(tokens[:1, : model.reach + 1])


def test_past_the_length_of_a_fixed_scale_it_warns(tokens):
    """The model accepts the text, at frequencies for a shorter one."""
    model = scaled_llama("clex", scale=2.5)
    with pytest.warns(UserWarning, match="41 tokens are past the 40 "):
        model(tokens[:1, :41])


@pytest.mark.parametrize("name", ["dynamic", "gene", "gene-param"])
def test_methods_without_an_end_go_on_without_a_word(name, tokens):
    """300 tokens are 18 times the trained length."""
    model = scaled_llama(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mx.isfinite(model(tokens[:1])).all()
    assert model.limit is None


def test_a_given_pass_replaces_the_one_of_the_length(tokens):
    """Training gives frequencies and positions; the pass is removed afterwards, also on errors."""
    model = scaled_llama("clex")
    ids = tokens[:1, :50]
    usual = model(ids)
    inv_freq = model.scaling.inv_freq(7.0)
    with given_pass(model, Pass(inv_freq=[inv_freq], positions=2 * mx.arange(50))):
        spread = model(ids)
    with given_pass(model, Pass(inv_freq=[2 * inv_freq], positions=mx.arange(50))):
        same = model(ids)
    assert worst(spread, same) < 1e-4
    assert worst(spread, usual) > 1e-2
    with pytest.raises(ZeroDivisionError), given_pass(model, Pass(inv_freq=[inv_freq])):
        model(ids[:, : 1 // 0])
    assert mx.array_equal(model(ids), usual)


def windowed_llama(layer_types):
    args = tiny_llama().args
    args.layer_types = layer_types
    args.num_hidden_layers = len(layer_types)
    args.sliding_window = 8
    mx.random.seed(1)
    return llama.Model(args)


def test_layers_with_a_window_keep_their_rope_and_cache(tokens):
    """A window never sees past its own size, so it needs no scaling."""
    model = attach(windowed_llama(["sliding_attention", "full_attention"]), {"type": "clex"})
    window, full = model.layers
    cache = make_prompt_cache(model, 60)

    assert isinstance(window.self_attn.rope, nn.RoPE)
    assert isinstance(full.self_attn.rope, Rope)
    assert [type(c) for c in cache] == [RotatingKVCache, ScaledKVCache]
    for start, stop in [(0, 20), (20, 40)] + [(i, i + 1) for i in range(40, 60)]:
        logits = model(tokens[:1, start:stop], cache=cache)
    assert cache[1].scale == 4.0
    assert worst(logits, model(tokens[:1, :60])[:, -1:]) < 1e-3


def test_each_layer_gets_its_own_of_the_learned_frequencies(tokens):
    """With windows in between, the second scaled layer is not the model's second."""
    model = windowed_llama(["full_attention", "sliding_attention", "full_attention"])
    attach(model, {"type": "gene-param", "factor": 2})
    ids = tokens[:1, :30]
    before = model(ids)
    for layer, changes in [(1, False), (2, True), (0, True)]:
        coefficients = mx.zeros(model.scaling.base_coef.shape)
        coefficients[layer] = 0.5
        model.scaling.base_coef = coefficients
        assert (worst(model(ids), before) > 1e-3) == changes, layer


def family(name, **fields):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    return module.Model(module.ModelArgs.from_dict(fields))


PHI = {
    "model_type": "phi",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": L0,
}


@pytest.mark.parametrize("kind", ["phi", "traditional"])
def test_partial_rotary_and_interleaved_models_are_served(kind, tokens):
    """Phi rotates half of each head; others pair neighbouring dimensions."""
    if kind == "phi":
        stock = family("phi", **PHI)
    else:
        args = tiny_llama().args
        args.rope_traditional = True
        stock = llama.Model(args)
    model = attach(stock, {"type": "clex", "max_factor": 8})
    randomise(model.scaling)
    assert model.scaling.dims == (8 if kind == "phi" else 32)
    cache = make_prompt_cache(model, 100)
    parts = [model(tokens[:1, i : i + 10], cache=cache) for i in range(0, 100, 10)]
    assert worst(mx.concatenate(parts, axis=1), model(tokens[:1, :100])) < 1e-4
    growing, moved = make_prompt_cache(model), make_prompt_cache(model)
    model(tokens[:1, :10], cache=growing)
    model(tokens[:1, :10], cache=moved)
    place = model._planner.keys[0].place
    moved[0].move_to([4.0], model._planner._difference_of(0), place)
    assert worst(moved[0].keys, growing[0].keys) > 1e-2
    moved[0].move_to([1.0], model._planner._difference_of(0), place)
    assert worst(moved[0].keys, growing[0].keys) < 1e-5


@pytest.mark.parametrize(
    "entry", [{"type": "llama3", "factor": 8.0}, {"type": "linear", "factor": 2.0}]
)
def test_frequencies_are_those_of_the_models_own_rope(entry):
    """The model's own rope scaling was dropped or applied twice."""
    args = tiny_llama().args
    args.rope_scaling = entry
    source = llama.Model(args)
    own = source.layers[0].self_attn.rope
    x = mx.random.normal((1, 1, 5, 32))
    before = own(x, offset=7)
    model = attach(source, {"type": "clex"}, scale=1.0)
    assert mx.abs(rotate(x, model.scaling.inv_freq(1.0), 7) - before).max() < 1e-5


def test_a_model_without_a_rope_is_told_what_was_looked_for():
    """GPT-2 has learned positions."""
    model = family(
        "gpt2",
        model_type="gpt2",
        n_ctx=16,
        n_embd=32,
        n_head=2,
        n_layer=1,
        n_positions=16,
        layer_norm_epsilon=1e-5,
        vocab_size=64,
    )
    with pytest.raises(InputError) as error:
        attach(model, {"type": "clex"}, trained_length=16)
    for word in ("`rope`", "mlx_lm.models.gpt2.Model", "c_attn", "KVCache"):
        assert word in str(error.value), str(error.value)


def test_a_trained_length_that_nobody_knows_is_asked_for():
    """Some families of mlx-lm drop max_position_embeddings from the config."""
    args = tiny_llama().args
    args.max_position_embeddings = None
    with pytest.raises(InputError, match="pass trained_length, in tokens"):
        attach(llama.Model(args), {"type": "clex"})
    model = attach(llama.Model(args), {"type": "clex"}, trained_length=32)
    assert model.reach == 16 * 32


def test_a_bad_entry_leaves_the_model_as_it_was(tokens):
    """An error half way through must not leave half a scaling."""
    model = tiny_llama()
    before = model(tokens[:1, :10])
    with pytest.raises(InputError):
        attach(model, {"type": "gene-param", "factor": 0})
    assert type(model) is llama.Model
    assert mx.array_equal(before, model(tokens[:1, :10]))


def test_scaling_weights_stay_out_of_casts_and_quantisation():
    """bfloat16 or 4-bit weights of the network would move every frequency."""
    model = scaled_llama("clex")
    assert not model.cast_predicate("scaling.up_proj")
    assert model.cast_predicate("model.norm.weight")
    before = model.scaling.inv_freq(7.0)
    model.set_dtype(mx.bfloat16)
    assert model.model.norm.weight.dtype == mx.bfloat16
    assert mx.array_equal(model.scaling.inv_freq(7.0), before)
    nn.quantize(model, group_size=32, bits=4)
    assert model.scaling.up_proj.dtype == mx.float32
    weights = model.sanitize({"scaling.up_proj": mx.zeros((2, 2), mx.bfloat16)})
    assert weights["scaling.up_proj"].dtype == mx.float32
