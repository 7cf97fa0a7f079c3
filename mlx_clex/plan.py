"""Command: the memory that a model needs at a length, before anything is loaded.

Only config.json and the headers of the weights are read. A machine can be described instead of
used: `--memory 32GB --backend metal`.

Not covered: speed, and what several machines share.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from .commands.options import add_shared, check_cache_options, check_least
from .commands.run_command import command
from .diagnosis.machine import (
    BACK_ENDS,
    Machine,
    described,
    parse_size,
    size_text,
    this_back_end,
    this_machine,
)
from .diagnosis.memory import Reading, Training, decoding, peak, reading, verdict
from .diagnosis.plan import Change, advice, changes, parts_text
from .diagnosis.sizes import Sizes, sizes_of
from .diagnosis.source import build, find_source
from .errors import InputError
from .model.scaled_model import scaled
from .pictures.memory import draw_memory
from .pictures.style import check_path
from .training.options import TrainingOptions

_DEFAULT_TRAINING = 2048  # tokens, as `lora`
_POINTS = 9  # lengths in the picture, each twice the one before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("model", help="A folder, a .gguf file, a Hugging Face id, or bundled:NAME.")
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="The length to read and continue. Default: the model's reach or trained length.",
    )
    parser.add_argument(
        "--train",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="Lengths of training sequences. Default: the longest that fits is shown.",
    )
    parser.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="Memory of the machine to plan for, such as 32GB. Default: this machine's.",
    )
    parser.add_argument(
        "--backend",
        choices=tuple(BACK_ENDS),
        help="The back end to plan for: cpu, metal or cuda. Default: the one in use here.",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="Texts or training sequences at once."
    )
    parser.add_argument(
        "--q-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="Plan for weights of so many bits."
    )
    add_shared(parser, "--kv-bits", "--prefill-step-size")
    parser.add_argument(
        "--num-layers",
        type=int,
        default=TrainingOptions.num_layers,
        help="How many of the last layers to train; -1: all.",
    )
    parser.add_argument("--rank", type=int, default=8, help="Rank of the adapters in training.")
    parser.add_argument(
        "--fine-tune-type",
        choices=("lora", "full"),
        default="lora",
        help="Train adapters, or all weights of the layers.",
    )
    parser.add_argument(
        "--grad-checkpoint",
        action="store_true",
        help="Plan for training that computes the inside of each layer again.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="Draw memory against length, .png or .svg. Default: no picture.",
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        InputError: a model or an option that cannot be used.
    """
    check_cache_options(args)
    for name in ("context", "batch_size", "prefill_step_size", "rank", "train"):
        check_least(args, name, 1)
    if args.num_layers != -1:
        check_least(args, "num_layers", 1)
    if args.memory is not None and args.memory < 1e6:
        raise InputError(
            f"--memory is {args.memory} bytes, and must be at least 1MB. Give a unit: 32GB."
        )
    if args.output is not None:
        check_path(args.output)
    machine = _machine(args)
    source = find_source(args.model)
    model = build(source)
    for option, length in [
        ("--context", args.context),
        *(("--train", n) for n in args.train or ()),
    ]:
        scaled(model).check_length(length or 0, option)
    sizes = sizes_of(source, args.q_bits, model)
    if args.kv_bits and not sizes.caches.quantisable:
        raise InputError("--kv-bits: the cache of this model cannot be quantised. Leave it out.")
    in_4_bits = None
    if args.q_bits is None and "quantization" not in source.config:
        in_4_bits = partial(sizes_of, source, 4)

    context = args.context or sizes.reach or scaled(model).trained_length or _DEFAULT_TRAINING
    read = Reading(
        length=context, batch=args.batch_size, step=args.prefill_step_size, kv_bits=args.kv_bits
    )
    trained = [
        Training(
            length=length,
            batch=args.batch_size,
            rank=args.rank,
            grad_checkpoint=args.grad_checkpoint,
            full=args.fine_tune_type == "full",
            num_layers=args.num_layers,
        )
        for length in args.train or [_DEFAULT_TRAINING]
    ]
    print(f"{args.model}: {_described(sizes)}")
    print(f"{machine}")
    if machine.back_end != "cpu":
        print("Not measured: attention as in MLX's source, the rest as measured on a CPU.")
    for name, parts in (
        ("reading", reading(sizes, read, machine.back_end)),
        ("decoding", decoding(sizes, read, machine.back_end)),
    ):
        _print_peak(name, context, peak(parts), parts_text(parts), machine)
    for run_ in trained if args.train else []:
        parts = Change("", sizes, run_).parts(machine.back_end)
        _print_peak("training", run_.length, peak(parts), parts_text(parts), machine)

    longest = max(trained, key=lambda run_: run_.length)
    found = {
        "context": changes(sizes, read, in_4_bits),
        "training sequence": changes(sizes, longest, in_4_bits),
    }
    for what, its in found.items():
        within = (
            f" (the model reaches {sizes.reach:,})" if what == "context" and sizes.reach else ""
        )
        print(f"\nLongest {what} that fits, in tokens{within}:")
        for change in its:
            print(f"  {change.longest(machine):>10,}  {change.options or 'as asked'}")
    print()
    print(f"Reading: {advice(found['context'], machine)}")
    for run_ in trained if args.train else []:
        print(f"Training: {advice(changes(sizes, run_, in_4_bits), machine)}")
    if args.output is not None:
        _draw(args.output, f"{args.model} on {machine}", found, machine)
        print(f"Drew {args.output}.")


def _machine(args: argparse.Namespace) -> Machine:
    here = this_machine()
    back_end = args.backend or here.back_end
    if args.memory is None and back_end == this_back_end():
        return here
    return described(args.memory or here.memory, back_end)


def _described(sizes: Sizes) -> str:
    reach = "any length" if sizes.reach is None else f"{sizes.reach:,} tokens"
    return f"{sizes.layers} layers, weights of {size_text(sizes.weights)}, made for {reach}"


def _print_peak(what: str, length: int, needed: float, parts: str, machine: Machine) -> None:
    verb = {"fits": "fits", "tight": "does not fit", "too large": "is refused without --force"}
    print(f"\n{what} {length:,} tokens: {size_text(needed)}, {verb[verdict(needed, machine)]}")
    print(f"  {parts}")


def _draw(path: Path, title: str, found: dict[str, list[Change]], machine: Machine) -> None:
    longest = max(change.run.length for its in found.values() for change in its)
    lengths = [longest >> n for n in reversed(range(_POINTS)) if longest >> n]
    lines = {}
    for what, its in found.items():
        verb = "reading" if what == "context" else "training"
        for change in (its[0], its[-1]):
            name = f"{verb} {change.options}".strip()
            parts = [change.parts(machine.back_end, length) for length in lengths]
            lines[name] = [(n, peak(p)) for n, p in zip(lengths, parts, strict=True)]
    draw_memory(lines, path, title, usable=machine.usable, memory=machine.memory)


main = command("plan", add_arguments, run, "my-model --context 65536 --memory 32GB --backend metal")


if __name__ == "__main__":
    sys.exit(main())
