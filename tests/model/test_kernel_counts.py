"""A token costs few kernels more than in the stock model: on a GPU, each has its price.

The graph of one decoded token is counted before it is computed. On Metal the fused rotation is one
kernel; MLX's CPU form of it is many, so one operation stands for it here.
"""

from collections import Counter

import mlx.core as mx
import pytest

from mlx_clex.model.scaled_model import make_prompt_cache

from ..conftest import scaled_llama, tiny_llama

# They run nothing.
VIEWS = (
    *("Slice", "Reshape", "Transpose", "Unflatten", "Flatten", "ExpandDims", "Squeeze"),
    *("Broadcast", "StopGradient", "CustomTransforms"),
)


@pytest.fixture(autouse=True)
def counted_as_on_metal(monkeypatch):
    """One operation for the fused rotation, and compiled functions as one."""
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.abs(x))
    mx.enable_compile()


def operations(array, path):
    """How often each operation is in the graph of an array."""
    mx.export_to_dot(str(path), array)
    lines = (line for line in path.read_text().splitlines() if "shape=rectangle" in line)
    names = Counter(line.split('label ="')[1].split('"')[0] for line in lines)
    for free in VIEWS:
        names.pop(free, None)
    return names


def of_a_layer(make, path, *, rows=1):
    """Operations of one more layer, in one decoded token."""
    counts = []
    for layers in (2, 3):
        model = make(layers)
        ids = mx.arange(70)[None] % 64
        caches = []
        for row in range(rows):
            cache = make_prompt_cache(model)
            mx.eval(model(ids[:, : 20 + 40 * row], cache=cache), [c.state for c in cache])
            caches.append(cache)
        cache = caches[0]
        if rows > 1:
            cache = [type(pair[0]).merge(pair) for pair in zip(*caches, strict=True)]
            mx.eval([c.state for c in cache if c.keys is not None])
        token = mx.zeros((rows, 1), mx.int32)
        model(token, cache=cache)  # a step of the scale moves keys, once
        mx.eval([c.state for c in cache if c.keys is not None])
        counts.append(operations(model(token, cache=cache), path).total())
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("name", "log_scale", "rows", "most"),
    [
        ("clex", False, 1, 0),
        ("yarn", False, 1, 2),  # a product of queries and of keys with the gain
        ("gene", False, 1, 0),
        ("clex", True, 1, 1),  # one product with the gain
        ("gene", True, 1, 1),
        ("clex", False, 2, 0),  # rows at unequal scales
        ("gene-param", False, 1, 3),  # angles, cosines and sines of every head
    ],
)
def test_a_layer_has_few_operations_more(name, log_scale, rows, most, tmp_path):
    """gene with log_scale had 7 more a layer, rows at unequal scales 7, gene-param 11."""
    path = tmp_path / "graph.dot"
    stock = of_a_layer(lambda layers: tiny_llama(layers=layers), path, rows=rows)
    ours = of_a_layer(
        lambda layers: scaled_llama(name, log_scale=log_scale, layers=layers), path, rows=rows
    )
    assert ours - stock <= most
