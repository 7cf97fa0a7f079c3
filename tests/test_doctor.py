"""The self-test must pass on a correct machine and fail on a wrong one."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_clex import doctor
from mlx_clex.commands.run_command import run_command

from . import make_self_test_data as maker

PLAIN = tuple(check for check in doctor.CHECKS if check is not doctor.decode_ratio)


def run_doctor(*argv: str) -> int:
    return run_command(doctor.add_arguments, doctor.run, prog="doctor", description="", argv=argv)


def test_prints_versions_and_device_without_options(capsys):
    """A bug report came without the version of mlx."""
    assert run_doctor() == 0

    out = capsys.readouterr().out
    assert f"mlx-clex       {importlib.metadata.version('mlx-clex')}" in out
    assert f"mlx            {importlib.metadata.version('mlx')}" in out
    assert "device" in out
    assert "PASS" not in out


@pytest.mark.parametrize("check", PLAIN, ids=lambda check: check.__name__)
def test_check_passes_here(check):
    """The self-test failed on a machine that computes correctly."""
    outcome = check()

    assert outcome.passed, str(outcome)


def test_decode_ratio_is_measured():
    """The two models had different sizes, so their ratio was meaningless."""
    # The bound is not checked because other tests share the cores.
    assert 0.2 < doctor.decode_ratio().measured < 5


def test_keys_that_do_not_move_fail(monkeypatch, capsys):
    """The self-test passed although keys kept the scale at which they were written."""
    right = doctor.rotate
    calls = iter(range(9))  # one writes the keys, seven move them, one rotates fresh keys
    monkeypatch.setattr(
        doctor, "rotate", lambda x, freq: x if 0 < next(calls) < 8 else right(x, freq)
    )

    assert doctor.self_test([doctor.moved_keys]) == 1
    assert capsys.readouterr().out.startswith("FAIL")


def test_wrong_gradients_fail(monkeypatch, capsys):
    """The self-test passed although the frequencies had no gradient."""
    right = doctor.rotate_at
    monkeypatch.setattr(
        doctor, "rotate_at", lambda x, freq, *rest: right(x, mx.stop_gradient(freq), *rest)
    )

    assert doctor.self_test([doctor.plain_gradients]) == 1
    assert capsys.readouterr().out.startswith("FAIL")


def test_a_check_that_raises_fails(monkeypatch, capsys):
    """One missing kernel ended the self-test, and the other results were lost."""

    def no_kernel() -> doctor.Outcome:
        raise RuntimeError("[rope] no kernel\nfor this device")

    monkeypatch.setattr(doctor, "CHECKS", (no_kernel, doctor.golden_frequencies))

    assert run_doctor("--self-test") == 1
    out, err = capsys.readouterr()
    assert "FAIL  no kernel" in out
    assert "RuntimeError: [rope] no kernel for this device" in out
    assert "PASS  golden frequencies" in out
    assert "1 of 2 checks failed" in err


def test_nan_fails():
    """A comparison with NaN counted as within the bound."""
    assert not doctor.Outcome(float("nan"), 1.0).passed
    assert not doctor.Outcome(float("nan"), 1.0, at_least=True).passed


def test_runs_as_a_command(tmp_path):
    """`python -m mlx_clex.doctor` found its data only from the source folder."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "mlx_clex.doctor"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("```\nmlx-clex")


def test_a_problem_is_in_the_status(tmp_path, converted, capsys):
    """A script could not see it: the status was 0."""
    folder = tmp_path / "model"
    shutil.copytree(converted("clex_llama"), folder)
    assert run_doctor(str(folder)) == 0
    for file in folder.glob("*token*"):
        file.unlink()
    assert run_doctor(str(folder)) == 1
    printed = capsys.readouterr()
    assert "No tokenizer" in printed.out
    assert "has 1 problem" in printed.err


def test_shipped_data_is_what_the_script_makes(tmp_path, monkeypatch):
    """The packaged outputs no longer matched the golden checkpoint."""
    shipped = maker.TARGET.read_bytes()
    monkeypatch.setattr(maker, "TARGET", Path(tmp_path) / "clex_llama.safetensors")
    maker.main()

    made = mx.load(str(maker.TARGET))
    (Path(tmp_path) / "shipped.safetensors").write_bytes(shipped)
    expected = mx.load(str(Path(tmp_path) / "shipped.safetensors"))
    assert made.keys() == expected.keys()
    assert all(mx.array_equal(made[name], expected[name]) for name in made)


def test_the_self_test_turns_tf32_off(tmp_path):
    """On M5 and CUDA, products in TF32 failed the self-test of a healthy machine: 4e-3 for 5e-4."""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    program = (
        "import os; from mlx_clex import doctor; doctor.CHECKS = ();"
        "seen = []; doctor.self_test = lambda checks: seen.append(os.environ['MLX_ENABLE_TF32']);"
        "import sys; sys.argv = ['doctor', '--self-test'];"
        "import contextlib\nwith contextlib.suppress(SystemExit): doctor.main()\n"
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
