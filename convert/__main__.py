"""python -m mlx_clex.convert: a published or base checkpoint becomes an MLX one."""

import argparse
import sys
from dataclasses import fields

from mlx_lm.convert import QUANT_RECIPES

from mlx_clex.commands.run_command import run_command
from mlx_clex.commands.scaling_options import add_scaling_arguments, scaling_from
from mlx_clex.errors import say

from .options import DTYPES, OWN_ROPES, PROGRAMS, Options
from .pipeline import convert

_DEFAULTS = {field.name: field.default for field in fields(Options)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: those of mlx_lm.convert under the same names, then ours."""
    parser.add_argument(
        "--hf-path",
        "--model",
        required=True,
        help="The source: a folder, a .gguf file, or OWNER/NAME on the Hugging Face hub.",
    )
    parser.add_argument(
        "--mlx-path", default="mlx_model", help="Folder to write; it must not exist."
    )
    parser.add_argument("--revision", help="Branch, tag or commit on the hub. Default: main.")
    parser.add_argument("-q", "--quantize", action="store_true", help="Quantise the weights.")
    parser.add_argument(
        "--q-group-size",
        type=int,
        help="Weights that share a scale. Default: 64, or that of --q-mode.",
    )
    parser.add_argument(
        "--q-bits", type=int, help="Bits per weight. Default: 4, or those of --q-mode."
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
        help="A recipe of mixed bits. Default: the same bits everywhere.",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Type of what is not quantised. Default: torch_dtype in config.json.",
    )
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="Write an unquantised model."
    )
    parser.add_argument("--upload-repo", help="Hub id to publish the result under. Default: none.")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run its own Python. A model's Python is never run.",
    )
    parser.add_argument(
        "--trained-length",
        type=int,
        help="Length the model was trained at, tokens. Default: max_position_embeddings.",
    )
    parser.add_argument(
        "--own-rope",
        choices=OWN_ROPES,
        help="With --scaling, for a source whose rope is stretched already (llama3, longrope, "
        "yarn): keep it as the base, or drop it and start from plain positions at the length "
        "before "
        "stretching, which changes short texts and needs training. Default: keep.",
    )
    parser.add_argument(
        "--freeze",
        type=float,
        metavar="SCALE",
        help="Hold this scale for good, in a checkpoint that needs no mlx_clex. Default: keep the "
        "scaling.",
    )
    parser.add_argument(
        "--for",
        dest="freeze_for",
        default=_DEFAULTS["freeze_for"],
        choices=PROGRAMS,
        help="The program a frozen checkpoint is for; llama.cpp gets one .gguf file.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print what would happen; write nothing."
    )
    add_scaling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert as the options say."""
    named = {
        name: getattr(args, name)
        for name in _DEFAULTS.keys() - {"scaling"} | {"revision", "upload_repo", "dry_run"}
    }
    target = convert(args.hf_path, args.mlx_path, scaling=scaling_from(args), **named)
    if target is not None and args.freeze is None:
        say(f"Next: mlx_clex generate --model {target} --prompt hello --max-tokens 50")
    elif target is not None and args.freeze_for == PROGRAMS[0]:
        say(f"Next: python -m mlx_lm generate --model {target} --prompt hello")


def main() -> None:
    """The console script."""
    sys.exit(
        run_command(
            add_arguments,
            run,
            prog="mlx_clex.convert",
            description="Convert a CLEX, GeNE or base checkpoint to MLX, or freeze one scale.",
            example="mlx_clex convert --hf-path DAMO-NLP-SG/CLEX-7B-16K --mlx-path clex-7b -q",
        )
    )


if __name__ == "__main__":
    main()
