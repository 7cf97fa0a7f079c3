"""Command: convert a published or base checkpoint to MLX, or freeze one scale."""

import argparse
import shlex
import sys
from dataclasses import fields

from mlx_lm.convert import QUANT_RECIPES

from mlx_clex.commands.options import add_shared, say_next
from mlx_clex.commands.run_command import command
from mlx_clex.commands.scaling_options import add_scaling_arguments, scaling_from
from mlx_clex.errors import say

from .options import DTYPES, PROGRAMS, Options
from .pipeline import convert

_DEFAULTS = {field.name: field.default for field in fields(Options)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of mlx_lm.convert under their own names, then those of mlx_clex."""
    parser.add_argument(
        "--hf-path",
        "--model",
        required=True,
        help="The source: a folder, a .gguf file, a Hugging Face id, or bundled:NAME.",
    )
    parser.add_argument(
        "--mlx-path", default="mlx_model", help="Folder to write; it must not exist."
    )
    parser.add_argument("--revision", help="Branch, tag or commit on the hub. Default: main.")
    parser.add_argument("-q", "--quantize", action="store_true", help="Quantise the weights.")
    parser.add_argument(
        "--q-group-size",
        type=int,
        help="Weights that share a quantisation scale. Default: that of --q-mode, 64 for affine.",
    )
    parser.add_argument(
        "--q-bits", type=int, help="Bits per weight. Default: that of --q-mode, 4 for affine."
    )
    parser.add_argument(
        "--q-mode",
        default=_DEFAULTS["q_mode"],
        choices=["affine", "mxfp4", "nvfp4", "mxfp8"],
        help="How weights are quantised.",
    )
    parser.add_argument(
        "--quant-predicate",
        choices=QUANT_RECIPES,
        help="A recipe that mixes bit widths. Default: the same bits for every layer.",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Type of the weights that are not quantised. Default: torch_dtype in config.json.",
    )
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="Write an unquantised model."
    )
    add_shared(parser, "--upload-repo", "--freeze", "--own-rope")
    add_shared(
        parser,
        "--trust-remote-code",
        help="Without effect, for scripts of mlx_lm.convert: no Python of a checkpoint is run.",
    )
    parser.add_argument(
        "--trained-length",
        type=int,
        help="Length the model was trained at, tokens. Default: max_position_embeddings.",
    )
    parser.add_argument(
        "--for",
        dest="freeze_for",
        default=_DEFAULTS["freeze_for"],
        choices=PROGRAMS,
        help="The program that runs the frozen checkpoint. llama.cpp gets one .gguf file.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print what would happen; write nothing."
    )
    add_scaling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert the checkpoint that the options name."""
    named = {
        name: getattr(args, name)
        for name in _DEFAULTS.keys() - {"scaling"} | {"revision", "upload_repo", "dry_run"}
    }
    target = convert(args.hf_path, args.mlx_path, scaling=scaling_from(args), **named)
    if target is not None and args.freeze is None:
        say_next(target)
    elif target is not None and args.freeze_for == PROGRAMS[0]:
        say(f"Next: python -m mlx_lm generate --model {shlex.quote(str(target))} --prompt hello")


main = command(
    "convert", add_arguments, run, "--hf-path DAMO-NLP-SG/CLEX-7B-16K --mlx-path clex-7b -q"
)


if __name__ == "__main__":
    sys.exit(main())
