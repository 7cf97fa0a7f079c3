"""OpenBLAS must be in place before MLX is, and must not be forced on anybody."""

import ctypes
import subprocess
import sys

import pytest

from mlx_clex._blas import LIBRARIES

MATMUL = """
import time
import mlx.core as mx
a = mx.random.normal((768, 768), key=mx.random.key(0))
mx.eval(a @ a)
seconds = []
for _ in range(3):
    start = time.perf_counter()
    mx.eval(a @ a)
    seconds.append(time.perf_counter() - start)
print(min(seconds), float((a @ a).sum()))
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def openblas() -> None:
    if sys.platform != "linux":
        pytest.skip("OpenBLAS is only looked for on Linux")
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return
    pytest.skip("no OpenBLAS on this machine (on Debian: libopenblas0-pthread)")


def test_importing_mlx_clex_makes_matmul_faster(openblas):
    """Float32 products on Linux ran at 5 GFLOP/s although OpenBLAS was installed."""
    stock, stock_sum = map(float, run_python(MATMUL).split())
    ours, our_sum = map(float, run_python("import mlx_clex\n" + MATMUL).split())

    assert ours < stock / 2, f"{ours:.4f} s with OpenBLAS, {stock:.4f} s without"
    assert our_sum == pytest.approx(stock_sum, abs=1.0)  # 590,000 terms, each about 28


def test_says_none_once_mlx_is_imported(openblas):
    """`doctor` named OpenBLAS although MLX had bound to its own BLAS already."""
    code = "from mlx_clex._blas import use_openblas; use_openblas.cache_clear(); "
    late = run_python(code + "import mlx.core; print(use_openblas())")

    assert late.strip() == "None"


def test_leaves_macos_alone(monkeypatch):
    """A Homebrew OpenBLAS must not be loaded into MLX on a Mac."""
    from mlx_clex._blas import use_openblas

    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", pytest.fail)

    assert use_openblas.__wrapped__() is None
