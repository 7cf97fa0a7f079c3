"""One writer a target at a time."""

import subprocess
import sys

from ..conftest import GOLDEN

HOLD = """
import sys, time
from pathlib import Path
from mlx_clex.checkpoint.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    print(time.time(), flush=True)
"""


def holder(target):
    """A program that holds the lock of a target until it is sent a line."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", HOLD, str(target)], text=True, **pipes)


def test_the_second_waits_for_the_first_and_says_so(tmp_path):
    """Two commands that used a published checkpoint first ended one of them."""
    first = holder(tmp_path / "target")
    assert first.stdout.readline() == "held\n"
    second = holder(tmp_path / "target")
    line = second.stderr.readline()
    assert f"Waiting for process {first.pid}, which writes {tmp_path / 'target'}." in line
    freed = first.communicate("\n", timeout=60)[0]
    held, taken = second.communicate("\n", timeout=60)[0].splitlines()
    assert held == "held"
    assert float(taken) >= float(freed)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_leaves_no_lock(tmp_path):
    """Nobody has to delete a lock file by hand."""
    first = holder(tmp_path / "target")
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.communicate()
    second = holder(tmp_path / "target")
    assert "held" in second.communicate("\n", timeout=60)[0]


def test_two_first_uses_of_a_published_checkpoint_both_work(tmp_path):
    """Ten times out of ten one of them failed, with the advice to delete a good cache."""
    code = (
        "import sys, mlx_clex; mlx_clex.load(sys.argv[1], cache_dir=sys.argv[2]); print('loaded')"
    )
    command = [sys.executable, "-c", code, str(GOLDEN / "clex_llama"), str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in both]
    assert [out for out, _ in ends] == ["loaded\n"] * 2, ends
    assert sum("once" in err for _, err in ends) == 1
