"""The self-test must pass on a correct machine and fail on a wrong one."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_clex import doctor
from mlx_clex.self_test import golden, kernels, run, running, training
from mlx_clex.self_test.measurement import Measurement
from mlx_clex.self_test.run import CHECKS, self_test

from .. import make_self_test_data as maker

# The others start a process or measure time, and have tests of their own.
PLAIN = [
    check for check in CHECKS if check not in (golden.prefill_with_tf32, running.decode_ratios)
]


def run_doctor(*argv: str) -> int:
    return doctor.main(argv)


@pytest.mark.parametrize("check", PLAIN, ids=lambda check: check.__name__)
def test_check_passes_here(check):
    """The self-test failed on a machine that computes correctly."""
    for found in check():
        assert found.passed, f"{found.name}: {found}"


def test_decode_ratios_are_information(monkeypatch):
    """The two models had different sizes; and a busy machine failed the self-test."""
    monkeypatch.setattr(running, "_BLOCKS", 3)
    found = list(running.decode_ratios())
    assert len(found) == 9
    assert all(0.1 < ratio.measured < 10 and ratio.passed for ratio in found)


def test_the_error_of_tf32_is_measured_in_a_process_of_its_own(monkeypatch):
    """MLX reads the variable once, so one process has one setting."""
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    (found,) = golden.prefill_with_tf32()
    (here,) = golden.prefill()
    assert found.bound is None
    assert found.measured == pytest.approx(here.measured, rel=0.5)  # a CPU has no TF32


def test_an_array_that_is_too_large(monkeypatch):
    """On a CPU it ends the process, so the check ran nowhere; an empty one passes."""
    assert list(running.too_large()) == []
    monkeypatch.setattr(running, "on_metal", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_buffer_length": 2**20})
    assert [found.passed for found in running.too_large()] == [False, True]

    ones = mx.ones

    def full(shape, *rest):
        if math.prod(shape) > 2**20:
            raise RuntimeError("[malloc] Unable to allocate")
        return ones(shape, *rest)

    monkeypatch.setattr(mx, "ones", full)
    assert [found.passed for found in running.too_large()] == [True, True]


def test_tf32_alone_breaks_the_golden_bound():
    """Emulated: a healthy M5 failed the self-test by its default, 4.2e-3 against 5e-4."""
    errors = {}
    for enabled in "01":
        done = subprocess.run(
            [sys.executable, "-m", "tests.emulate_metal", "-m", "mlx_clex.self_test.golden"],
            env=os.environ | {"MLX_ENABLE_TF32": enabled},
            capture_output=True,
            text=True,
            check=True,
        )
        errors[enabled] = float(done.stdout)
    assert errors["0"] < 5e-4
    assert 1e-3 < errors["1"] < 1e-2


def test_keys_that_do_not_move_fail(monkeypatch, capsys):
    """The self-test passed although keys kept the scale at which they were written."""
    right, calls = golden.rotate, iter(range(18))
    # One call writes the keys, seven move them, one rotates fresh keys.
    monkeypatch.setattr(
        golden, "rotate", lambda x, freq: x if 0 < next(calls) % 9 < 8 else right(x, freq)
    )
    assert self_test({}, [golden.moved_keys]) == (2, 2)
    assert capsys.readouterr().out.startswith("FAIL")


def wrong_rope(x, dims, *, freqs, offset, **_):
    """A rotation without the offset."""
    return STOCK_ROPE(x, dims, traditional=False, base=None, scale=1.0, offset=0, freqs=freqs)


STOCK_ROPE = mx.fast.rope


@pytest.mark.parametrize(
    ("owner", "name", "broken", "check"),
    [
        (mx.fast, "rope", wrong_rope, kernels.rope),
        (
            mx.fast,
            "scaled_dot_product_attention",
            lambda q, k, v, **_: v[:, :, : q.shape[2]] * mx.ones_like(q),
            kernels.fused_attention,
        ),
        (kernels.nn.losses, "cross_entropy", lambda x, t, **_: x.sum(), kernels.cross_entropy),
        (training.TrainingStep, "pass_for", None, training.training_step),
    ],
)
def test_a_wrong_kernel_fails(owner, name, broken, check, monkeypatch):
    """A bound that nothing reaches would tell nothing of a Mac."""
    if broken is None:
        right = getattr(owner, name)

        def broken(step, inputs):
            positions = inputs.positions + 1 * (inputs.positions > 20)
            return right(step, inputs._replace(positions=positions))

    monkeypatch.setattr(owner, name, broken)
    assert not all(found.passed for found in check())


def test_a_check_that_raises_fails(monkeypatch, capsys):
    """One missing kernel ended the self-test, and the other results were lost."""

    def no_kernel() -> Iterator[Measurement]:
        yield Measurement("first", 0, 1)
        raise RuntimeError("[rope] no kernel\nfor this device")

    monkeypatch.setattr(run, "CHECKS", (no_kernel, golden.frequencies))

    assert run_doctor("--self-test") == 1
    out, err = capsys.readouterr()
    assert "FAIL  no kernel" in out
    assert "RuntimeError: [rope] no kernel for this device" in out
    assert "PASS  golden frequencies" in out
    assert "1 of 3 checks failed" in err
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    block = json.loads(line)
    assert [row["verdict"] for row in block["checks"]] == ["PASS", "FAIL", "PASS"]
    assert block["about"]["TF32"].startswith("MLX_ENABLE_TF32=")


def test_nan_fails_and_information_does_not():
    """A comparison with NaN counted as within the bound."""
    nan = float("nan")
    assert not Measurement("x", nan, 1.0).passed
    assert not Measurement("x", nan, 1.0, at_least=True).passed
    assert Measurement("x", 1e9).passed


def test_shipped_data_is_what_the_script_makes(tmp_path, monkeypatch):
    """The packaged outputs no longer matched the golden checkpoint, or the bundled models."""
    maker.write_model(tmp_path / maker.MODEL)
    made, expected = (mx.load(str(folder / maker.MODEL)) for folder in (tmp_path, maker.FOLDER))
    assert made.keys() == expected.keys()
    assert all(mx.array_equal(made[name], expected[name]) for name in made)

    # These two are of one machine; the self-test has their bounds.
    gradients = mx.load(str(maker.FOLDER / training.FILE))
    assert gradients.keys() == maker.gradients().keys()
    perplexities = json.loads((maker.FOLDER / running.PERPLEXITIES).read_text())
    assert all(list(by) == [str(n) for n in running.LENGTHS] for by in perplexities.values())


def test_the_self_test_turns_tf32_off(tmp_path):
    """On M5 and CUDA, products in TF32 failed the self-test of a healthy machine: 4e-3 for 5e-4."""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    program = (
        "import contextlib, os, sys\n"
        "from mlx_clex import doctor\n"
        "from mlx_clex.self_test import run\n"
        "seen = []; run.self_test = lambda about: seen.append(os.environ['MLX_ENABLE_TF32']) or "
        "(1, 0); sys.argv = ['doctor', '--self-test']\n"
        "with contextlib.suppress(SystemExit): doctor.main()\n"
        "assert seen == [sys.stdin.read()]"
    )
    for given in ("0", "1"):
        chosen = {"MLX_ENABLE_TF32": given} if given == "1" else {}
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment | chosen,
            input=given,
            text=True,
            check=True,
            capture_output=True,
        )
