"""Load OpenBLAS, which gives the Linux CPU build of MLX a fast matrix product.

The Linux wheel of MLX carries a reference BLAS. When OpenBLAS is loaded with global symbols
before `mlx.core` is, the wheel's cblas calls bind to OpenBLAS instead: 182 against 5.3 GFLOP/s
for a float32 product of 1024 x 1024 on a 2-core x86-64 machine. Loaded after
`mlx.core` it has no effect, because the calls are already bound.

Not covered: bfloat16 and quantised products, which MLX computes without a BLAS.
"""

import ctypes
import functools
import sys

# Debian, Ubuntu, Arch; Fedora's threaded and OpenMP builds; a symlink from a -dev package.
# All have 32-bit integers, as MLX passes.
LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblaso.so.0", "libopenblas.so")


@functools.cache
def use_openblas() -> str | None:
    """Load OpenBLAS before MLX, on Linux, if it is installed.

    Returns:
        The name of the library that MLX will use, or None: not on Linux, none found, or
        `mlx.core` was imported first.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None
