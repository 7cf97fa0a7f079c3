"""Command: print versions and device, describe a model, and run a self-test.

The self-test needs no network and no model; its data are in `golden/` (made by
tests/make_self_test_data.py). The output is one block that can be pasted into an issue.

Not covered: speed and memory at the size of a real model.
"""

import argparse
import os
import sys

from .commands.run_command import command
from .diagnosis.machine import versions
from .diagnosis.model_report import report
from .errors import RunError

_WIDTH = 14  # of the names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "model",
        nargs="?",
        default=None,
        help="Also describe this model: a folder, a .gguf file or a Hugging Face id. Its weights "
        "are not read.",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="Also check logits, kernels, gradients, quantised models, batches and memory on this "
        "device, and time decoding. Takes a minute.",
    )


def run(args: argparse.Namespace) -> None:
    """Print the block.

    Raises:
        InputError: the model is not found.
        RunError: a check of the self-test failed.
    """
    rows = report(args.model) if args.model is not None else []
    if args.self_test:
        # On M5 and CUDA, MLX multiplies float32 in TF32, of three digits; it reads the variable at
        # its first product, which is in the self-test. A value that is set stays.
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
    about = versions()
    print("```")
    for name, value in (*about.items(), *rows):
        print(f"{name:<{_WIDTH}} {value}")
    if args.self_test:
        from .self_test.run import self_test

        total, failed = self_test(about)
    print("```")
    if args.self_test and failed:
        raise RunError(f"{failed} of {total} checks failed. Please report the block above.")


main = command("doctor", add_arguments, run, "my-model")


if __name__ == "__main__":
    sys.exit(main())
