"""For all families of mlx-lm: attach equals the stock model with hand-made ropes.

The other side of each comparison is the stock model with `HandRope`s, which rotate in
plain cosines and sines, and for decoding `HandCache`s, which keep keys unrotated and
rotate all of them at every fetch. Where ropes and keys are comes from the table in
`tiny_families.py`, not from what attach found.
"""

import pkgutil
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from mlx_lm.models import muse_spark
from mlx_lm.models.cache import CacheList, KVCache

from mlx_clex import attach, make_prompt_cache
from mlx_clex.errors import InputError
from mlx_clex.evaluation.perplexity import logits_of_text
from mlx_clex.model.chunked_loss import chunk_for, loss_for_gradient, token_losses
from mlx_clex.scaling import SCALINGS
from mlx_clex.training.setup import check_family

from ..conftest import randomise
from ..family_table import page as page_of_families
from ..tiny_families import FAMILIES, L0, SMALL, tiny

SERVED = [n for n, family in FAMILIES.items() if not (family.refused or family.absent)]
GROWING = [n for n in SERVED if not FAMILIES[n].one_scale]
REFUSED = [n for n, family in FAMILIES.items() if family.refused]
CLEX = {"type": "clex", "max_factor": 4}


class Hand:
    """The frequencies and gain shared by the ropes and caches of one stock model."""

    def __init__(self, inv_freq=None, keep_keys=False, gain=1.0):
        self.inv_freq = inv_freq  # radians per token, (D/2,)
        self.keep_keys = keep_keys  # unrotated, for a HandCache
        self.gain = gain  # on queries
        self.passes = 0

    def turn(self, x, start, traditional):
        """Rotate (B, H, L, head_dim) from position `start`."""
        half = self.inv_freq.shape[-1]
        positions = start + mx.arange(x.shape[-2])
        angles = positions[:, None].astype(mx.float32) * self.inv_freq
        cos, sin = mx.cos(angles), mx.sin(angles)
        rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
        if traditional:
            pairs = rotary.reshape(*rotary.shape[:-1], half, 2)
            a, b = pairs[..., 0], pairs[..., 1]
            turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
            turned = turned.reshape(rotary.shape)
        else:
            a, b = rotary[..., :half], rotary[..., half:]
            turned = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        return mx.concatenate([turned, rest], axis=-1)


class HandRope(nn.Module):
    """Rotates by the frequencies of the hand."""

    def __init__(self, hand, traditional, keys_first, queries_only):
        super().__init__()
        self._hand = hand
        self._traditional = traditional
        self._key_call = None if queries_only else int(not keys_first)
        self._last = (0, 0)

    def __call__(self, x, offset=0):
        hand, (last_pass, calls) = self._hand, self._last
        call = calls if last_pass == hand.passes else 0
        self._last = (hand.passes, call + 1)
        if call == self._key_call:
            return x if hand.keep_keys else hand.turn(x, offset, self._traditional)
        return hand.gain * hand.turn(x, offset, self._traditional)


class HandCache(KVCache):
    """Keeps keys unrotated and rotates all of them whenever they are read."""

    def __init__(self, hand, traditional, part, at_end):
        super().__init__()
        self.hand, self.traditional, self.part, self.at_end = hand, traditional, part, at_end

    def keys_and_values(self):
        keys, values = super().keys_and_values()
        x = keys if self.part == "keys" else values
        start = x.shape[-1] - 2 * self.hand.inv_freq.shape[-1] if self.at_end else 0
        turned = self.hand.turn(x[..., start:], 0, self.traditional)
        x = mx.concatenate([x[..., :start], turned], axis=-1)
        return (x, values) if self.part == "keys" else (keys, x)


class ByHand:
    """A stock model with the ropes of its scaled layers replaced by hand."""

    def __init__(self, name, hand):
        self.hand, self.family, self.model = hand, FAMILIES[name], tiny(name)
        self.sites = {}  # layer -> (part of the cache, traditional) of its ropes, in order
        for layer in scaled_layers(name, self.model):
            found = [
                ("index" in path or rope == "index_rope", module, rope)
                for path, module in self.model.layers[layer].named_modules()
                for rope in self.family.ropes
                if isinstance(module.get(rope), nn.Module)
            ]
            self.sites[layer] = []
            for index, module, rope in sorted(found, key=lambda site: site[0]):
                traditional = getattr(module[rope], "traditional", name == "deepseek_v2")
                part = "keys" if index else self.family.part
                self.sites[layer].append((part, traditional))
                first = rope in self.family.keys_first
                only = layer in self.family.queries_only
                module[rope] = HandRope(hand, traditional, first, only)

    def __call__(self, ids, cache=None):
        self.hand.passes += 1
        return self.model(ids, cache=cache)

    def make_cache(self):
        make = getattr(self.model, "make_cache", lambda: [KVCache() for _ in self.model.layers])
        caches = make()
        for layer, sites in self.sites.items():
            if layer in self.family.queries_only:
                continue
            at = layer + self.family.first_cache
            inside = list(caches[at].caches) if isinstance(caches[at], CacheList) else [caches[at]]
            plain = [i for i, cache in enumerate(inside) if type(cache) is KVCache]
            for i, (part, traditional) in zip(plain, sites, strict=True):
                at_end = self.family.at_end
                inside[i] = HandCache(self.hand, traditional, part, at_end)
            if isinstance(caches[at], CacheList):
                caches[at].caches = inside
            else:
                (caches[at],) = inside
        return caches


def scaled_layers(name, model):
    scaled = FAMILIES[name].scaled
    return range(len(model.layers)) if scaled is None else scaled


def frequencies(name, model, scale):
    """Return the frequencies of the scaling; zero for pairs that the family does not rotate."""
    inv_freq = model.scaling.inv_freq(scale)
    pairs = FAMILIES[name].pairs
    return inv_freq if pairs is None else mx.where(mx.arange(inv_freq.size) < pairs, inv_freq, 0)


def attached(name, scale=None, **fields):
    model = attach(tiny(name), {**CLEX, **fields}, trained_length=L0, scale=scale)
    randomise(model.scaling)
    return model


def close(ours, theirs):
    assert ours.shape == theirs.shape
    silent = mx.isinf(theirs)  # phi3small masks unused ids
    assert mx.array_equal(silent, mx.isinf(ours))
    ours, theirs = mx.where(silent, 0, ours), mx.where(silent, 0, theirs)
    error = (mx.abs(ours - theirs).max() / mx.abs(theirs).max()).item()
    assert error < 1e-4, f"differs by {error:.1e} of the largest logit"


@pytest.fixture(autouse=True, scope="module")
def _uncompiled():
    """On a CPU every compiled function waits for a C++ compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def ids(tokens):
    return tokens[:1, :40]


@pytest.mark.filterwarnings("ignore:.* tokens are past")
@pytest.mark.parametrize("name", SERVED)
def test_scale_one_is_the_stock_model(name, ids):
    """Attaching must not change the logits of any family."""
    close(attached(name, scale=1.0)(ids), tiny(name)(ids))


@pytest.mark.parametrize("name", SERVED)
def test_a_pass_at_a_higher_scale_has_those_frequencies(name, ids):
    """Every layer with full attention is scaled, and no other."""
    scale = 3.0 if FAMILIES[name].one_scale else None
    model = attached(name, scale)
    hand = Hand(frequencies(name, model, model.scale_at(ids.shape[1])))
    theirs = ByHand(name, hand)(ids)
    close(model(ids), theirs)
    with pytest.raises(AssertionError, match="differs by"):
        close(tiny(name)(ids), theirs)


@pytest.mark.parametrize("name", SERVED)
def test_the_head_runs_on_parts_of_a_text(name, ids):
    """Perplexity and training run the body whole and the head in parts, of every family."""
    model = attached(name, scale=3.0)
    tokens, targets = ids[:, :-1], ids[:, 1:]
    logits = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
    parts = [part for _, part in logits_of_text(model, np.array(ids), head_chunk=16)]
    close(mx.concatenate(parts, axis=1), logits)
    if name == "gemma3n":
        with pytest.raises(InputError, match="gemma3n without a cache"):
            check_family(model)
        return
    check_family(model)
    loss = nn.value_and_grad(
        model, partial(loss_for_gradient, model, chunk=min(16, chunk_for(model)))
    )
    (_, summed), gradient = loss(tokens, targets, mx.ones(targets.shape))
    expected = token_losses(logits, targets).sum()
    assert abs(summed.item() / expected.item() - 1) < 1e-5
    assert "scaling" in gradient


@pytest.mark.parametrize("name", GROWING)
def test_decoding_across_steps_of_the_scale(name, ids):
    """Cached keys must follow the scale, wherever a family keeps them."""
    model = attached(name)
    hand = Hand(keep_keys=True)
    by_hand = ByHand(name, hand)
    ours, theirs = make_prompt_cache(model), by_hand.make_cache()
    end, scales = 0, []
    for count in (14, 1, 1, 1, 13, 1, 1, 1):
        chunk, end = ids[:, end : end + count], end + count
        scales.append(model.scale_at(end))
        hand.inv_freq = frequencies(name, model, scales[-1])
        close(model(chunk, cache=ours), by_hand(chunk, cache=theirs))
    assert len(set(scales)) == 3, scales


@pytest.mark.parametrize("name", SERVED)
def test_a_gain_is_on_all_of_each_query_or_refused(name, ids):
    """If keys come first, or a rope gets part of a query, log_scale would be applied wrongly."""
    no_gain = FAMILIES[name].no_gain
    if no_gain:
        for key in ("log_scale", "log_gain"):
            with pytest.raises(InputError, match=f"multiplies queries.*{no_gain}.*to false"):
                attached(name, scale=3.0, **{key: True})
        return
    model = attached(name, scale=3.0, log_scale=True)
    gain = model.scaling.query_gain(None, 3 * L0, 3.0)
    assert gain > 1.2
    close(model(ids), ByHand(name, Hand(frequencies(name, model, 3.0), gain=gain))(ids))


@pytest.mark.parametrize("name", [n for n in SERVED if FAMILIES[n].one_scale])
def test_keys_that_cannot_move_hold_a_family_at_one_scale(name, ids):
    """A growing scale would silently keep keys of the old scale."""
    with pytest.raises(InputError, match=f"{FAMILIES[name].one_scale}.*Pass scale="):
        attached(name)
    model = attached(name, scale=3.0)
    cache = make_prompt_cache(model)
    model(ids[:, :20], cache=cache)
    close(model(ids[:, 20:], cache=cache), model(ids)[:, 20:])


@pytest.mark.parametrize(
    "name",
    [
        *("bailing_moe", "deepseek_v3", "deepseek_v32", "gemma4_text", "gptj"),
        *("longcat_flash", "minicpm3", "olmo3", "youtu_llm"),
    ],
)
def test_rows_of_a_batch_move_on_their_own(name, ids):
    """Keys of one row must be rotated without those of the other, in every family."""
    model = attached(name)
    rows = [ids[:, :14], ids[:, 5:16]]
    alone = [make_prompt_cache(model) for _ in rows]
    for row, cache in zip(rows, alone, strict=True):
        model(row, cache=cache)
    batch = [type(pair[0]).merge(pair) for pair in zip(*alone, strict=True)]
    for i in range(20, 28):  # to 22 tokens and 19: each crosses 16 at a time of its own
        token = ids[:, i : i + 1]
        together = model(mx.concatenate([token, token]), cache=batch)
        for row, cache in enumerate(alone):
            close(together[row : row + 1], model(token, cache=cache))


def test_heads_that_differ_by_layer_are_no_place_for_tensors_a_head():
    """gene-param has one array of layers and heads."""
    model = tiny("openelm", num_query_heads=[4, 2], num_kv_heads=[4, 2])
    with pytest.raises(InputError, match=r"gene-param .*4 heads .*2 heads.*such as gene"):
        attach(model, {"type": "gene-param"}, trained_length=L0)
    attach(model, {"type": "gene"}, trained_length=L0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_refused_with_the_reason(name):
    """The error has the reason, and the model is unchanged."""
    model = tiny(name)
    with pytest.raises(InputError, match=FAMILIES[name].refused):
        attached(name)
    with pytest.raises(InputError):
        attach(model, CLEX, trained_length=L0)
    assert mx.isfinite(model(mx.arange(5)[None])).all()


def test_a_rope_that_a_kernel_reads_is_not_replaced(monkeypatch):
    """muse_spark's Metal kernel takes `rope.base` and rotates itself: a scaling had no effect."""

    def rotated(qkvg, *, n_heads, n_kv_heads, head_dim, **_):
        queries, keys, _ = mx.split(
            qkvg, [n_heads * head_dim, (n_heads + n_kv_heads) * head_dim], 2
        )
        return (mx.unflatten(x, -1, (-1, head_dim)) for x in (queries, keys))

    def added(branch, stream, *, next_norm, **_):
        total = stream + branch
        return total, total if next_norm is None else next_norm(total)

    # The kernels run on Metal only; these have their shapes.
    for name, stand_in in {
        "qk_norm_rope": rotated,
        "rms_norm_sigmoid_gate": lambda x, gate, eps: x.swapaxes(1, 2).flatten(2) * gate,
        "norm_add_norm": added,
    }.items():
        monkeypatch.setattr(muse_spark, name, stand_in)
    monkeypatch.setattr(muse_spark.MoE, "__call__", lambda self, x: x)
    text = {
        **SMALL,
        **{"rms_norm_eps": 1e-5, "post_norm_eps": 1e-5, "moe_hidden_size": 32},
        **{"rope_parameters": {"rope_theta": 1e4}, "layer_rope_theta": [1e4, 1e4]},
        **{"layer_types": ["full_attention"] * 2, "sliding_window": 8, "output_multiplier": 1.0},
        **{"final_logit_softcapping": 30.0, "num_local_experts": 2, "num_experts_per_tok": 1},
        **{"moe_intermediate_size": 32, "head_dim": 16, "num_shared_experts": 0},
    }
    args = {"model_type": "muse_spark", "text_config": text}
    model = muse_spark.Model(muse_spark.ModelArgs.from_dict(args))
    why = "muse_spark.* has a rope but does not call it, so a scaling cannot replace it"
    with pytest.raises(InputError, match=why):
        attach(model, CLEX, trained_length=L0)


DEEPSEEK = {"type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("name", "entry", "rope"),
    [
        ("mixtral", {}, "RoPE"),
        ("phi", {}, "RoPE"),
        ("gemma4_text", {}, "ProportionalRoPE"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "RoPE"),
        ("gpt_oss", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "YarnRoPE"),
        ("deepseek_v3", {"rope_scaling": DEEPSEEK}, "YarnRoPE"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "Llama3RoPE"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "YarnRoPE"),
        ("deepseek_v2", {"rope_scaling": {"type": "yarn", "factor": 40.0}}, "Deepseek"),
        (
            "hunyuan_v1_dense",
            {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
            "DynamicNTKAlpha",
        ),
        (
            "minicpm3",
            {
                "rope_scaling": {
                    "type": "longrope",
                    "original_max_position_embeddings": L0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0 + i for i in range(8)],
                }
            },
            "SuScaledRoPE",
        ),
    ],
)
@pytest.mark.parametrize("method", SCALINGS)
def test_any_rope_is_a_base(name, entry, rope, method):
    """At scale 1 a scaled model equals its source; Llama 3.1 was off by 5 in a logit."""
    options = {} if SCALINGS[method].hard_reach else SCALINGS[method].options_for(1.0)
    source = tiny(name, **entry)
    ids = mx.arange(12)[None]
    before = source(ids)
    kinds = {type(module).__name__ for module in source.modules()}
    assert any(rope in kind for kind in kinds)
    try:
        attach(source, {"type": method, **options}, trained_length=L0, scale=1.0)
    except InputError as error:
        why = "multiplies queries" if FAMILIES[name].no_gain and method == "yarn-t" else "heads"
        assert why in str(error)  # noqa: PT017
        assert method in ("gene-param", "yarn-t")
        return
    # gene-param rounds a period and its reciprocal to float32: 2 ulp, 1.3e-6 rad at position 11.
    assert mx.abs(source(ids) - before).max() < 2e-4


def test_a_rope_that_follows_the_length_is_no_base():
    """No list of frequencies describes mlx-lm's dynamic rope; the error says where it differs."""
    entry = {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}
    message = r"DynamicNTKScalingRoPE.*frequencies at position 1000 differ"
    with pytest.raises(InputError, match=message):
        attach(tiny("internlm3", **entry), CLEX, trained_length=L0)


def test_every_file_of_mlx_lm_is_in_the_table():
    """A family that is new in mlx-lm must be added to the table."""
    parts = {"activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline"}
    parts |= {"rope_utils", "ssm", "switch_layers"}
    files = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    assert files - parts == set(FAMILIES)
    assert len(GROWING) >= 60


def test_the_page_has_the_table():
    """docs/families.md is made by `python -m tests.family_table`."""
    page = Path(__file__).parents[2] / "docs" / "families.md"
    assert page.read_text() == page_of_families()
