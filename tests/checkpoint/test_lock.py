"""One writer a target at a time."""

import subprocess
import sys
import time

from ..conftest import GOLDEN

HOLD = """
import sys, time
from pathlib import Path
from mlx_clex.checkpoint.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
print("done", time.time(), flush=True)
"""


def holder(target, seconds):
    command = [sys.executable, "-c", HOLD, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_second_waits_for_the_first_and_says_so(tmp_path):
    """Two commands that used a published checkpoint first ended one of them."""
    first = holder(tmp_path / "target", 20)
    assert first.stdout.readline() == "held\n"
    second = holder(tmp_path / "target", 0)
    out, err = second.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == []
    freed = first.communicate(timeout=60)[0].split()[-1]
    assert f"Waiting for process {first.pid}, which writes {tmp_path / 'target'}." in err
    assert float(out.split()[-1]) >= float(freed)


def test_a_killed_holder_leaves_no_lock(tmp_path):
    """Nobody has to delete a lock file by hand."""
    first = holder(tmp_path / "target", 60)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.communicate()
    started = time.time()
    second = holder(tmp_path / "target", 0)
    assert "done" in second.communicate(timeout=60)[0]
    assert time.time() - started < 30


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
