"""Command: merge adapters and their scaling into one complete checkpoint.

`mlx_clex.convert` writes the merged weights, so the result is a converted checkpoint with a card.
mlx-lm runs it where mlx_clex is installed; a frozen one needs no mlx_clex.

Not covered: GGUF, which cannot hold a scaling.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import MAX_FILE_SIZE_GB, dequantize_model

from .checkpoint.adapters import other_base, read_adapters
from .checkpoint.config import BASE_ROPE, SHIM, base_config, is_ours, normalise_config
from .checkpoint.files import expand, scratch_folder, write_json
from .checkpoint.folder import files_of, read_config
from .commands.help import point_elsewhere
from .commands.options import add_shared, say_next
from .commands.run_command import command
from .convert import convert
from .convert.freeze.stock_rope import frozen_config
from .convert.write.card import licence_of
from .convert.write.output import check_target, write_weights
from .errors import InputError
from .loading import load, resolve
from .model.own_rope import without_own_rope
from .model.scaled_model import ScaledModel
from .scaling import Scaling
from .scaling.none import NoScaling

_NOT_THE_TOKENIZER = (".safetensors", ".bin", ".gguf", ".py", ".md", ".index.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of mlx_lm.fuse under their own names, then those of mlx_clex."""
    parser.add_argument(
        "--model",
        required=True,
        help="The base model: a folder, a .gguf file or a Hugging Face id.",
    )
    parser.add_argument(
        "--save-path", default="fused_model", help="Folder to write; it must not exist."
    )
    parser.add_argument(
        "--adapter-path", default="adapters", help="The folder with the trained adapters."
    )
    add_shared(parser, "--upload-repo", "--freeze", "--trust-remote-code")
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="Write an unquantised model."
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Fuse adapters into a base model that they were not trained on.",
    )
    gguf = "Fuse first, then mlx_clex convert --freeze SCALE --for llama.cpp."
    point_elsewhere(parser, {"--export-gguf": gguf, "--gguf-path": gguf})


def run(args: argparse.Namespace) -> None:
    """Merge the adapters and write the checkpoint.

    Raises:
        InputError: the base model, the adapters or the target cannot be used.
    """
    target = expand(args.save_path)
    check_target(target)
    if args.upload_repo is not None:
        from .convert.read.hub import check_upload

        check_upload(args.upload_repo)
    base = resolve(args.model)
    message = other_base(base, args.adapter_path)
    if message is not None and not args.force:
        raise InputError(f"{message} To fuse them anyway, add --force.")
    model, _ = load(
        args.model, adapter_path=args.adapter_path, trust_remote_code=args.trust_remote_code
    )
    _, adapters = read_adapters(args.adapter_path)
    scaling = model.scaling if isinstance(model, ScaledModel) else None
    dropped = adapters.get("own_rope") == "drop"
    config = merged_config(read_config(base), scaling, dropped=dropped)
    if args.freeze is not None:  # before the merge, which takes long
        if scaling is None:
            raise InputError("--freeze: the model has no mlx_clex scaling. Leave the option out.")
        frozen_config(config, scaling, args.freeze, "mlx-lm")
    merge(model, dequantize=args.dequantize)
    if args.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    # On the disk of the target, which needs the space for the result anyway.
    with scratch_folder(target.with_name(f"{target.name}.merged")) as scratch:
        merged = scratch / target.name
        merged.mkdir()
        weights: Any = dict(tree_flatten(model.parameters()))
        model.update(tree_map(lambda _: mx.array([]), model.parameters()))  # written ones are freed
        write_weights(merged, weights, {}, shard_bytes=MAX_FILE_SIZE_GB << 30, file_format="mlx")
        for file in files_of(base):
            if not file.name.endswith(_NOT_THE_TOKENIZER):
                shutil.copyfile(file, merged / file.name)
        write_json(merged / "config.json", config)
        convert(
            merged,
            target,
            origin=f"{args.model}, with the adapters {Path(args.adapter_path).resolve().name}",
            licence=licence_of(base),
            freeze=args.freeze,
            upload_repo=args.upload_repo,
        )
    say_next(target)


def merge(model: nn.Module, *, dequantize: bool = False) -> None:
    """Merge every adapter into the weights that it adapts, in place.

    Args:
        model: a model from `load` with adapters.
        dequantize: leave no layer quantised.
    """
    adapted: list[tuple[str, Any]] = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    ]
    if adapted:
        model.update_modules(tree_unflatten(adapted))
    if dequantize:
        dequantize_model(model)
    mx.eval(model.parameters())


def merged_config(
    config: dict[str, Any], scaling: Scaling | None, *, dropped: bool
) -> dict[str, Any]:
    """Return the config of the base model with the scaling of the adapters.

    Args:
        config: config.json of the base model.
        scaling: the scaling of the model with the adapters, or None.
        dropped: whether training started from a plain rope in place of the model's own.
    """
    config = normalise_config(config)
    if dropped:
        config = without_own_rope(base_config(config))
    before = config.get("rope_scaling")
    if scaling is None or (isinstance(scaling, NoScaling) and before is None):
        return config
    if before is not None and not is_ours(config, before["type"]):
        config[BASE_ROPE] = before
    return config | {
        "rope_scaling": scaling.entry(),
        "model_file": SHIM,
        "max_position_embeddings": scaling.trained_length,
    }


main = command(
    "fuse", add_arguments, run, "--model base-model --adapter-path adapters --save-path tuned"
)


if __name__ == "__main__":
    sys.exit(main())
