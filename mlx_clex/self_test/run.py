"""Run the checks; print a table and one line of JSON."""

import json
import time
from collections.abc import Iterable, Mapping

from ..errors import one_line
from . import golden, kernels, running, training
from .measurement import Check

CHECKS: tuple[Check, ...] = (
    golden.frequencies,
    golden.prefill,
    golden.prefill_with_tf32,
    golden.decode,
    golden.moved_keys,
    golden.network_gradients,
    kernels.fused_attention,
    kernels.rope,
    kernels.cross_entropy,
    kernels.attention_memory,
    training.training_step,
    running.quantised_weights,
    running.quantised_cache,
    running.unequal_scales,
    running.worker_thread,
    running.too_large,
    running.perplexity,
    running.decode_ratios,
)


def self_test(about: Mapping[str, str], checks: Iterable[Check] | None = None) -> tuple[int, int]:
    """Run checks and print a line for each measurement, then all of them as one line of JSON.

    Args:
        about: versions and device, which become part of the JSON.
        checks: what to run; None: all.

    Returns:
        How many lines there are that can fail, and how many of them failed.
    """
    rows = []
    start = time.perf_counter()

    def told(verdict: str, name: str, detail: str, **values: float | str | None) -> None:
        rows.append({"verdict": verdict, "name": name, **values})
        print(f"{verdict:<4}  {name:<36} {detail}", flush=True)

    for check in CHECKS if checks is None else checks:
        try:
            for found in check():
                verdict = "info" if found.bound is None else ("PASS" if found.passed else "FAIL")
                # JSON has no NaN.
                values = {"measured": f"{found.measured:.6g}", "bound": found.bound}
                told(verdict, found.name, str(found), **values)
        # A check that raises has failed; the other checks still run.
        except Exception as error:
            detail = f"{type(error).__name__}: {one_line(error)}"
            told("FAIL", check.__name__.replace("_", " "), detail, error=detail)
    seconds = round(time.perf_counter() - start, 1)
    verdicts = [row["verdict"] for row in rows]
    failed = verdicts.count("FAIL")
    total = failed + verdicts.count("PASS")
    print(f"{total} checks in {seconds:.0f} s, {failed} failed")
    print(json.dumps({"about": dict(about), "checks": rows, "seconds": seconds}))
    return total, failed
