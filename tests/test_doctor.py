"""The doctor prints what an issue needs to know of a machine."""

import importlib.metadata
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_clex import doctor
from mlx_clex.diagnosis import machine


def run_doctor(*argv: str) -> int:
    return doctor.main(argv)


def test_prints_versions_and_device_without_options(capsys):
    """A bug report came without the version of mlx."""
    assert run_doctor() == 0

    out = capsys.readouterr().out
    assert f"mlx-clex       {importlib.metadata.version('mlx-clex')}" in out
    assert f"mlx            {importlib.metadata.version('mlx')}" in out
    assert "device" in out
    assert "PASS" not in out


def test_a_mac_tells_its_system_and_limits(monkeypatch):
    """Whether a buffer fits was not to be seen in a report."""
    info = {
        "device_name": "Apple M5",
        "max_buffer_length": 14 << 30,
        "max_recommended_working_set_size": 12 << 30,
    }
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    lines = machine.versions()
    assert lines["macOS"] == "26.1"
    assert "device_name Apple M5" in lines["device"]
    assert lines["limits"].endswith("buffer 15.03 GB, wired 12.88 GB")
    assert lines["TF32"] == "MLX's default, on"


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


@pytest.mark.parametrize("argv", [("nowhere",), ("nowhere", "--self-test")])
def test_a_model_that_is_not_there_is_one_line(argv, capsys):
    """The self-test ran for a minute before the name was looked up."""
    assert run_doctor(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
