"""Measure the time of CLEX's ODE solve at load and its error against a fine float64 solve.

    python -m benchmarks.ode [--quick]

The reference integrates the paper's dz/dt, as the release does, with the 3/8 rule in float64
at step 0.01. It shares no code with mlx_clex.
"""

import argparse
import math
import statistics
import time

import mlx_clex  # noqa: F401  (before mlx.core: on Linux it looks for OpenBLAS)

# isort: split
import mlx.core as mx
import numpy as np

from mlx_clex.scaling import Scaling, build_scaling

DIMS = 128  # D
BASE = 10_000.0
STEP = 0.01  # in t


def weights(deviation: float, seed: int = 0) -> dict[str, mx.array]:
    """Return an initial W_up and a random W_down of this standard deviation."""
    rng = np.random.default_rng(seed)
    up = rng.uniform(-1, 1, (DIMS // 2, DIMS)) / math.sqrt(DIMS)
    down = rng.normal(0, deviation, (DIMS, DIMS // 2))
    return {
        "scaling.up_proj": mx.array(up, dtype=mx.float32),
        "scaling.down_proj": mx.array(down, dtype=mx.float32),
    }


def build(max_factor: int, tensors: dict[str, mx.array]) -> Scaling:
    """Return a CLEX scaling whose ODE is not solved yet."""
    return build_scaling(
        {"type": "clex", "max_factor": max_factor},
        dims=DIMS,
        base=BASE,
        trained_length=4096,
        weights=tensors,
    )


def reference(max_factor: int, tensors: dict[str, mx.array]) -> np.ndarray:
    """Return ln inv_freq at the scales 1..max_factor, float64, (max_factor, D/2)."""
    up = np.array(tensors["scaling.up_proj"], np.float64)
    down = np.array(tensors["scaling.down_proj"], np.float64)
    i = np.arange(0, DIMS, 2)

    def slope(t: float, z: np.ndarray) -> np.ndarray:
        alpha = 2 * t - 1
        ln_n = -i / DIMS * (math.log(BASE) + DIMS / (DIMS - 2) * math.log(alpha))
        return np.tanh((z + ln_n) @ up) @ down - 2 * i / ((DIMS - 2) * alpha)

    z = -i / DIMS * math.log(BASE)
    result = [z]
    steps = round(1 / STEP)
    for n in range((max_factor - 1) * steps):
        t, h = 1 + n * STEP, STEP
        k1 = slope(t, z)
        k2 = slope(t + h / 3, z + h * k1 / 3)
        k3 = slope(t + 2 * h / 3, z + h * (k2 - k1 / 3))
        k4 = slope(t + h, z + h * (k1 - k2 + k3))
        z = z + h * (k1 + 3 * (k2 + k3) + k4) / 8
        if (n + 1) % steps == 0:
            result.append(z)
    return np.stack(result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 timings instead of 21")
    parser.add_argument(
        "--deviation", type=float, default=0.005, help="standard deviation of W_down"
    )
    args = parser.parse_args()

    tensors = weights(args.deviation)
    print("| max_factor | solve, median | slowest | error in ln inv_freq | network's part |")
    print("|---|---|---|---|---|")
    for max_factor in (10, 16, 64):
        times = []
        for _ in range(3 if args.quick else 21):
            scaling = build(max_factor, tensors)
            start = time.perf_counter()
            mx.eval(scaling.inv_freq(float(max_factor)))
            times.append(1000 * (time.perf_counter() - start))
        ours = np.stack([np.array(scaling.inv_freq(t + 1.0)) for t in range(max_factor)])
        exact = reference(max_factor, tensors)
        error = np.abs(np.log(ours.astype(np.float64)) - exact).max()
        untrained = reference(max_factor, weights(0.0))
        part = np.abs(exact - untrained).max()
        print(
            f"| {max_factor} | {statistics.median(times):.1f} ms | {max(times):.1f} ms "
            f"| {error:.1e} | {part:.2f} |"
        )


if __name__ == "__main__":
    main()
