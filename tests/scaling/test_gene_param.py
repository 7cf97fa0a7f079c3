"""gene-param on devices that round pow and exp in another way."""

import mlx.core as mx
import numpy as np

from mlx_clex.diagnosis.model_report import report
from mlx_clex.scaling import gene

from ..conftest import scaled_llama


def jittered(function, rng):
    """The function with results off by up to 4 units in the last place."""

    def off(*args):
        exact = function(*args)
        steps = mx.array(rng.integers(-4, 5, exact.shape).astype(np.int32))
        return mx.view(mx.view(exact, mx.int32) + steps, mx.float32)

    return off


class Jittered:
    """`mlx.core` for the module of the solve."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.power, self.exp = jittered(mx.power, rng), jittered(mx.exp, rng)

    def __getattr__(self, name):
        return getattr(mx, name)


def test_the_last_bits_of_pow_and_exp_do_not_matter(tokens, monkeypatch):
    """1 ulp moved a golden logit by 7e-2, where the two learned terms cancel. Here none do."""
    logits = []
    for jitter in (False, True):
        model = scaled_llama("gene-param")
        model.scaling.specific_coef = mx.abs(model.scaling.specific_coef)
        if jitter:
            monkeypatch.setattr(gene, "mx", Jittered())
        logits.append(model(tokens[:1, :256]))
        mx.eval(logits)
    change = mx.abs(logits[0] - logits[1]).max().item()
    assert 0 < change < 1e-3


def test_doctor_warns_of_periods_that_cancel(converted):
    """Below a tenth of a token, the last bit decides the angle. The golden checkpoint has some."""
    problems = [
        text for name, text in report(str(converted("gene_param_llama"))) if name == "problem"
    ]
    (text,) = problems
    assert "radians per token (above pi it aliases)" in text
    speed = float(text.split(" turns ")[1].split()[0])
    assert speed > 10
