"""Compare mlx_clex with stock mlx-lm on the same weights.

    python -m benchmarks [CASE ...] [--model MODEL] [--quick] [--output results.json]

Every case times blocks of stock mlx-lm, of ours and of stock again, in turns. The table has the
median ratio of speeds with a 95 % bootstrap interval, beside that of stock against stock. A goal is
met where the median reaches it; one of 0.99, where the interval reaches it and the median is at
least 0.97. Growth is the time at this length over that at the first, ours / stock's. A case that
cannot run says why. Other programs on the machine widen the intervals.
"""

import argparse
import difflib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_clex  # noqa: F401 - before mlx.core: on Linux it looks for OpenBLAS
from mlx_clex.diagnosis.machine import BACK_ENDS, size_text, this_back_end
from mlx_clex.errors import one_line

from . import speed, whole
from .blocks import AGAIN, OURS, STOCK, Comparison, NotRun
from .speed import Setup

CASES: dict[str, Callable[[Setup], Iterator[Comparison | NotRun]]] = {
    **speed.CASES,
    **whole.CASES,
}
PACKAGES = ("mlx-clex", "mlx", "mlx-lm", "numpy")
COLUMNS = "case | length | stock, s | ours, s | ours / stock | stock / stock | growth | memory"
COLUMNS += " | goal | met"


def where() -> dict[str, Any]:
    """Return what the figures depend on: machine, back end, versions and commit."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{mx.device_info().get('device_name')}, {platform.platform()}",
        "back_end": BACK_ENDS[this_back_end()],
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": found.stdout.strip() or "not a git checkout",
    }


def cells(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    ratios = [
        f"{row[name]:.3f} ({row[f'{low}low']:.3f} to {row[f'{low}high']:.3f})"
        for name, low in (("ratio", ""), ("noise", "noise_"))
    ]
    unit = "" if row["unit"] == "tokens" else f" {row['unit']}"
    figures = [row["case"], f"{row['length']:,}{unit}", f"{row['stock_seconds']:.3f}"]
    figures += [f"{row['seconds']:.3f}", *ratios]
    figures.append(" / ".join(f"{growth:.2f}" for growth in row["growth"].values()) or "-")
    memory = {kind: size_text(size) for kind, size in row["memory"].items() if kind != AGAIN}
    figures.append(f"{memory[OURS]}, stock {memory[STOCK]}" if memory else "-")
    goals = [] if row["goal"] is None else [f"{row['goal']:g}"]
    if row["most_extra"] is not None:
        extra = f"{1000 * row['extra_seconds']:+.0f}"
        goals.append(f"+{1000 * row['most_extra']:.0f} ms: {extra} ms")
    if row["memory_goal"] is not None:
        goals.append(f"{row['memory_goal']:g} of the memory")
    figures.append(", ".join(goals) or "-")
    figures.append({True: "yes", False: "no", None: "-"}[row["met"]])
    return f"| {' | '.join(figures)} |"


def main(argv: list[str] | None = None) -> None:
    """Run the cases, print the table, and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument(
        "--model", default="bundled:base", help="the stock model (default: bundled:base)"
    )
    parser.add_argument("--backend", choices=tuple(BACK_ENDS), help="refuse to run on another one")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        help="in tokens (default: 512 2048 8192 32768; of --quick: 512 2048)",
    )
    parser.add_argument("--blocks", type=int, default=9, help="blocks of each kind (default: 9)")
    parser.add_argument("--quick", action="store_true", help="shorter lengths, blocks of 8 tokens")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor seconds, for a CPU with other work; not in `server`",
    )
    parser.add_argument("--output", type=Path, help="a .json file for the results")
    args = parser.parse_args(argv)
    for name in args.cases:
        if name not in CASES:
            near = difflib.get_close_matches(name, CASES, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            parser.error(f"there is no case {name!r}.{hint} Cases: {', '.join(CASES)}.")
    if args.backend not in (None, this_back_end()):
        parser.error(f"{BACK_ENDS[args.backend]} is not there: MLX uses {this_back_end()} here.")
    lengths = args.lengths or ([512, 2048] if args.quick else [512, 2048, 8192, 32768])
    if args.blocks < 2 or min(lengths) < 2:
        parser.error("--blocks and --lengths must be at least 2.")
    setup = Setup(args.model, tuple(sorted(lengths)), args.blocks, cpu_time=args.cpu_time)
    if args.quick:
        setup = replace(setup, tokens=8, trained_length=256, trained=(512,), quick=True)
    clock = "processor" if args.cpu_time else "wall-clock"
    facts = where() | {"clock": clock}
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"model {args.model}, float32, {args.blocks} blocks of each kind, {clock} seconds\n")
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}")
    rows, skipped, failed = [], {}, False
    for name in args.cases or CASES:
        first: dict[str, Comparison] = {}
        try:
            for found in CASES[name](setup):
                if isinstance(found, NotRun):
                    label = f"{found.case}, {found.length:,}"
                    skipped[label] = found.reason
                    print(f"| {label} | not run: {found.reason} |", flush=True)
                    continue
                rows.append(found.row(first.get(found.case)))
                first.setdefault(found.case, found)
                print(cells(rows[-1]), flush=True)
        except (Exception, SystemExit) as error:  # one case must not end the others
            skipped[name], failed = one_line(error), True
            print(f"| {name} | not run: {skipped[name]} |", flush=True)
    if args.output is not None:
        results = {**facts, "model": args.model, "rows": rows, "not_run": skipped}
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
