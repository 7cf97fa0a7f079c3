"""Reading with a quantised cache: the fused attention, and the same answers."""

import mlx.core as mx
import pytest
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache

from mlx_clex.model.scaled_model import make_prompt_cache

from ..conftest import scaled_llama

STOCK = base.quantized_scaled_dot_product_attention.__wrapped__
HOW = {"group_size": 32, "bits": 4}


@pytest.mark.parametrize("mask", ["causal", "boolean", "additive", None])
@pytest.mark.parametrize("heads", [2, 8])
def test_restored_keys_give_the_attention_of_mlx_lm(heads, mask):
    """A read prompt must not depend on which of the two ways attended to it."""
    queries, keys, values = (
        mx.random.normal((2, h, n, 64), key=mx.random.key(h + n))
        for h, n in ((8, 40), (heads, 100), (heads, 101))
    )
    values = values[:, :, :100]
    if mask in ("boolean", "additive"):
        seen = base.create_causal_mask(40, 60)
        mask = seen if mask == "boolean" else mx.where(seen, 0.0, -1e9)
    stored = [mx.quantize(a, **HOW) for a in (keys, values)]

    ours = base.quantized_scaled_dot_product_attention(queries, *stored, 0.125, mask, **HOW)
    theirs = STOCK(queries, *stored, 0.125, mask, **HOW)

    assert mx.abs(ours - theirs).max().item() < 1e-5


@pytest.mark.parametrize("name", ["clex", "yarn"])
def test_reading_never_multiplies_with_quantised_keys(name, tokens, monkeypatch):
    """The scores of a pass of 2,048 tokens at 131k took 17 GB, where the cache saved 12."""
    model = scaled_llama(name)
    lengths = []
    original = mx.quantized_matmul

    def spy(x, *args, **kwargs):
        lengths.append(x.shape[-2])
        return original(x, *args, **kwargs)

    monkeypatch.setattr(mx, "quantized_matmul", spy)
    caches = make_prompt_cache(model, expected_length=60)
    assert isinstance(caches[0], KVCache)
    model(tokens[:1, :20], cache=caches)
    maybe_quantize_kv_cache(caches, 0, 32, 8)
    model(tokens[:1, 20:29], cache=caches)
    assert lengths == []

    model(tokens[:1, 29:37], cache=caches)
    model(tokens[:1, 37:38], cache=caches)
    assert set(lengths) == {8, 1}
