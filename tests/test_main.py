"""The front door: one word before all commands."""

import os
import subprocess
import sys

import pytest

from mlx_clex.__main__ import COMMANDS, NAMES


def mlx_clex(*arguments, script=False):
    start = [f"{sys.prefix}/bin/mlx_clex"] if script else [sys.executable, "-m", "mlx_clex"]
    return subprocess.run([*start, *arguments], capture_output=True, text=True)


def test_without_a_command_it_lists_them_in_groups():
    """`python -m mlx_clex` said that there is no __main__."""
    done = mlx_clex()
    assert done.returncode == 0
    assert done.stdout == mlx_clex("--help").stdout
    for group, commands in COMMANDS.items():
        assert f"\n{group}:\n" in done.stdout
        for name, text in commands.items():
            assert f"  {name:14}{text}\n" in done.stdout


def test_help_imports_no_model_code():
    """It took 2.7 seconds, most of them to import transformers."""
    code = (
        "import sys, mlx_clex; from mlx_clex.__main__ import main; main()\n"
        "assert not {'mlx.core', 'mlx_lm', 'transformers'} & set(sys.modules)\n"
        "assert {'attach', 'load', 'make_prompt_cache'} <= set(dir(mlx_clex))\n"
        "assert not hasattr(mlx_clex, 'laod')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_of_the_help_may_leave():
    """`mlx_clex --help | head -3` was a Python error."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "mlx_clex", "--help"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert done.stderr == b""


@pytest.mark.parametrize("script", [False, True])
def test_it_runs_a_command(script):
    """As a module and as a console script; the usage shows the one form of the README."""
    done = mlx_clex("cache_prompt", "--help", script=script)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mlx_clex cache_prompt ")
    done = mlx_clex("generate", "--model", "./nowhere", script=script)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "mlx_clex generate: error: There is no folder or file './nowhere'"
    )


def test_the_version():
    assert mlx_clex("--version").stdout.startswith("mlx_clex 0.")


def test_an_unknown_command_is_one_line():
    """With the nearest one; `perplexety` was a Python error about a missing module."""
    done = mlx_clex("perplexety")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean perplexity?" in done.stderr
    assert all(name in done.stderr for name in NAMES)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--model", "~nobody-here/model"),
        ("convert", "--hf-path", "bundled:base", "--mlx-path", "~nobody-here/model"),
        (
            "lora",
            "--train",
            "--model",
            "bundled:base",
            "--data",
            "~nobody-here/a",
            "--scaling",
            "none",
        ),
        ("plot", "~nobody-here/run.json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_home_folder_of_no_user_is_one_line(arguments):
    """It was a Python error: Could not determine home directory."""
    done = mlx_clex(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "~nobody-here" in done.stderr
