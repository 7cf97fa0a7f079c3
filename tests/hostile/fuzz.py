"""`make fuzz`: random inputs for every parser of what strangers send.

A parser may take an input, or refuse it with an InputError of one line; any other exception is a
fault, and so is a text that is cut at stop strings in another way than the definition says.
Hypothesis draws the inputs and shrinks one that fails. Where atheris is installed, a quarter of
the inputs is guided by the branches that the parser takes (`guided.py`).

Run it as `python -m tests.hostile.fuzz [--inputs N] [--only TEXT]`.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .fuzz_inputs import Target
from .fuzz_targets import targets

_DEFAULT = 100_000
_GUIDED = 0.25  # share of the inputs


def guided(target: Target, count: int) -> str | None:
    """Give a parser this many guided inputs in a process of its own; return the fault or None."""
    command = [sys.executable, "-m", "tests.hostile.guided", target.name, str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        taken, refused, fault = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, LookupError):
        return f"status {done.returncode}: {done.stderr[-1500:]}"
    target.taken += taken
    target.refused += refused
    return fault


def main() -> None:
    """Fuzz every parser, print the counts, and exit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=_DEFAULT, help="inputs of all parsers")
    parser.add_argument(
        "--derandomize", action="store_true", help="the same inputs in every run, none guided"
    )
    parser.add_argument("--only", default="", help="parsers whose name has this text")
    args = parser.parse_args()
    share = 0.0 if args.derandomize or not importlib.util.find_spec("atheris") else _GUIDED
    print(f"{share:.0%} of the inputs are guided by atheris.")
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    lost = inputs = 0
    try:
        found = list(targets(folder))
        whole = sum(target.share for target in found)
        print(f"{'parser':22}{'inputs':>9}{'taken':>9}{'refused':>9}{'lost':>6}{'seconds':>9}")
        for target in found:
            if args.only not in target.name:
                continue
            started = time.monotonic()
            count = max(1, round(args.inputs * target.share / whole))
            led = round(count * share)
            faults = [target.fault(target.test(count - led, derandomize=args.derandomize))]
            if led:
                faults.append(guided(target, led))
            faults = [fault for fault in faults if fault]
            count = target.taken + target.refused
            inputs += count
            lost += len(faults)
            seconds = time.monotonic() - started
            figures = f"{count:9}{target.taken:9}{target.refused:9}{len(faults):6}{seconds:9.1f}"
            print(f"{target.name:22}{figures}", flush=True)
            for fault in faults:
                print(f"LOST   {target.name}: {fault}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{inputs} inputs, {lost} lost, {time.monotonic() - began:.0f} s.")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
