"""One parser of `fuzz.py` under atheris: inputs guided by the branches that the parser takes.

libFuzzer changes bytes, and Hypothesis makes the input of them. The last line that is printed is
a JSON list: inputs taken, inputs refused, and the fault or null.

Run it as `python -m tests.hostile.guided PARSER INPUTS`.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mlx_clex"]):
    from .fuzz_targets import targets

_LONGEST = 8192  # bytes; Hypothesis reads no more
_SEEDS = 16  # random inputs to start from
_CALLS = 50  # at most, for one input: Hypothesis makes nothing of some bytes


def main() -> None:
    """Try the inputs, print the result, and exit."""
    name, count = sys.argv[1], int(sys.argv[2])
    folder = Path(tempfile.mkdtemp(prefix="guided-"))
    (folder / "seeds").mkdir()
    for i in range(_SEEDS):
        (folder / "seeds" / str(i)).write_bytes(os.urandom(_LONGEST))
    (target,) = (found for found in targets(folder) if found.name == name)
    give = target.test(count).hypothesis.fuzz_one_input
    calls = 0

    def one(data: bytes) -> None:
        nonlocal calls
        calls += 1
        fault = target.fault(lambda: give(data))
        if fault or target.taken + target.refused >= count or calls >= _CALLS * count:
            print(f"\n{json.dumps([target.taken, target.refused, fault])}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)  # atheris.Fuzz does not return

    options = [f"-max_len={_LONGEST}", "-len_control=0", "-rss_limit_mb=0", "-timeout=300"]
    atheris.Setup([sys.argv[0], *options, str(folder / "seeds")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
