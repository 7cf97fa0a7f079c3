"""Versions and device of this machine, and its memory, or that of one that is described.

Not covered: memory that other programs use at the moment.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.utils import _parse_size

from .._blas import use_openblas

PACKAGES = ("mlx-clex", "mlx", "mlx-lm", "transformers", "numpy")
BACK_ENDS = {"cpu": "CPU", "metal": "Metal", "cuda": "CUDA"}
_SMALL_MAC = 36 * 2**30  # bytes; below, macOS gives a GPU less


@dataclass(frozen=True)
class Machine:
    """What decides whether a run fits."""

    back_end: str  # one of `BACK_ENDS`
    memory: float  # bytes: of the machine, or of the GPU
    usable: float  # bytes that MLX can use

    def __str__(self) -> str:
        return (
            f"{BACK_ENDS[self.back_end]}, {size_text(self.memory)}, of which MLX can use "
            f"{size_text(self.usable)}"
        )


def this_machine() -> Machine:
    """Return the back end and memory of this machine."""
    back_end = this_back_end()
    info = mx.device_info()
    if back_end == "metal":
        usable = float(info["max_recommended_working_set_size"])
        return Machine(back_end, float(info["memory_size"]), usable)
    if back_end == "cuda":
        return described(float(info["total_memory"]), back_end)
    return described(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), back_end)


def described(memory: float, back_end: str | None = None) -> Machine:
    """Return a machine with this much memory.

    Args:
        memory: bytes.
        back_end: one of `BACK_ENDS`; None: this machine's.
    """
    back_end = back_end or this_back_end()
    share = 0.9  # the rest is for the system, Python and its packages
    if back_end == "metal":
        # recommendedMaxWorkingSetSize of macOS, where iogpu.wired_limit_mb is not set.
        share = 2 / 3 if memory < _SMALL_MAC else 3 / 4
    return Machine(back_end, memory, share * memory)


def this_back_end() -> str:
    """Return the back end that MLX uses here."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def parse_size(text: str) -> int:
    """Parse a size such as 32GB for argparse; GB is 10^9 bytes, as in mlx-lm."""
    try:
        size = _parse_size(text)
    except (KeyError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"must be a size such as 4GB, got {text!r}") from error
    return size


def size_text(count: float) -> str:
    """Return a number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def versions() -> dict[str, str]:
    """Return versions, device, system and MLX's limits, as texts by name."""
    lines = {}
    for package in PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
    lines["python"] = f"{platform.python_version()} on {platform.platform()}"
    if sys.platform == "darwin":
        lines["macOS"] = platform.mac_ver()[0]
    lines["back end"] = BACK_ENDS[this_back_end()]
    info = mx.device_info()
    lines["device"] = ", ".join(f"{key} {value}" for key, value in info.items())
    limits = {
        "memory": mx.get_memory_limit(),
        "buffer": info.get("max_buffer_length"),
        "wired": info.get("max_recommended_working_set_size"),
    }
    lines["limits"] = ", ".join(
        f"{name} {size_text(float(value))}" for name, value in limits.items() if value is not None
    )
    given = os.environ.get("MLX_ENABLE_TF32")
    lines["TF32"] = f"MLX_ENABLE_TF32={given}" if given else "MLX's default, on"
    if sys.platform == "linux":
        lines["OpenBLAS"] = use_openblas() or (
            "not in use (not found, or mlx was imported before mlx_clex)"
        )
    return lines
