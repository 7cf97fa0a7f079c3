"""Decoding never waits for the device in code of mlx_clex.

mlx-lm queues the next token while the last one is computed. One `.item()` per token would stop
that, and no test of values would show it.
"""

import sys
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlx_clex import make_prompt_cache
from mlx_clex.scaling import SCALINGS

from ..conftest import scaled_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*past the.*that this model's scaling")

COUNT = 40  # tokens decoded
WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__array__")
MODELS = [(name, False) for name in SCALINGS] + [("clex", True), ("gene", True)]


@pytest.fixture
def waits(monkeypatch):
    """Counts calls out of mlx_clex, however deep, that wait for the device."""
    counted: Counter[str] = Counter()

    def ours():
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("mlx_clex"):
                return True
            frame = frame.f_back
        return False

    def counting(name, call):
        def count(*args, **kwargs):
            counted[name] += ours()
            return call(*args, **kwargs)

        return count

    for name in WAITS:
        if hasattr(mx.array, name):
            monkeypatch.setattr(mx.array, name, counting(name, getattr(mx.array, name)))
    for module, name in [(mx, "eval"), (mx, "synchronize"), (np, "array"), (np, "asarray")]:
        kept = getattr(module, name)

        def count(*args, _name=name, _module=module, _kept=kept, **kwargs):
            # numpy reads an array of mlx without asking it by name.
            reads = _module is mx or any(isinstance(arg, mx.array) for arg in args)
            counted[_name] += reads and ours()
            return _kept(*args, **kwargs)

        monkeypatch.setattr(module, name, count)
    return counted


def caches_of(model, lengths):
    """Return caches with one row per length, read and merged as in mlx-lm's batches."""
    rows = []
    for length in lengths:
        row = make_prompt_cache(model)
        model(mx.zeros((1, length), mx.int32), cache=row)
        rows.append(row)
    if len(rows) == 1:
        return rows[0]
    return [type(layer[0]).merge(layer) for layer in zip(*rows, strict=True)]


def decode(model, caches, rows):
    token = mx.zeros((rows, 1), mx.int32)
    for _ in range(COUNT):
        token = model(token, cache=caches)[:, -1:].argmax(axis=-1)
        mx.async_eval(token)
    return token


@pytest.mark.parametrize(("name", "log_scale"), MODELS)
@pytest.mark.parametrize("lengths", [(20,), (20, 20, 20), (5, 40, 90)], ids=str)
def test_no_token_waits_for_the_host(waits, name, log_scale, lengths):
    """One row, rows at one scale, rows at three, over steps of the scale."""
    model = scaled_llama(name, log_scale=log_scale)
    # Every scale on the way is solved once, on the host, the first time it is met.
    decode(model, caches_of(model, lengths), len(lengths))
    caches = caches_of(model, lengths)
    waits.clear()

    decode(model, caches, len(lengths))

    assert +waits == Counter()


def test_the_count_sees_a_wait(waits):
    """The test above would always pass if the counter never counted."""
    model = scaled_llama("clex")
    model.scaling.inv_freq(2.0)
    source = {"__name__": "mlx_clex.somewhere", "mx": mx, "np": np}
    for line in ("mx.array(1).item()", "mx.eval(mx.array(1))", "np.array(mx.array(1))"):
        before = waits.total()
        eval(line, source)  # noqa: S307 - one of three lines above
        assert waits.total() > before, line
    before = waits.total()
    mx.array(1).item()
    assert waits.total() == before, "a test's own wait is no wait of ours"
