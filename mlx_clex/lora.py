"""Command: fine-tune a model for texts longer than it was trained on.

Takes the options and YAML files of `mlx_lm.lora`; adapters are in mlx-lm's own format.
Added are the scaling and how its scales and positions are drawn, packing, clipping,
warm-up and cosine, perplexity by length, and going on after an interruption.

Not covered: a model that one process cannot hold.
"""

import argparse
import hashlib
import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from mlx.utils import tree_flatten
from mlx_lm.lora import CONFIG_DEFAULTS, build_parser, yaml_loader
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.tuner.utils import print_trainable_parameters
from mlx_lm.utils import _parse_size, maybe_set_recommended_wired_limit

from .checkpoint.adapters import ADAPTER_SCALING, EXTRA_WEIGHTS
from .checkpoint.digest import weights_digest
from .checkpoint.folder import read_config
from .commands.run_command import check_seed, run_command
from .commands.scaling_options import add_scaling_arguments, scaling_from
from .data.corpus import Corpus, load_corpora
from .errors import InputError
from .evaluation.perplexity import check_lengths, mean_loss
from .loading import DEFAULT_CACHE, load, resolve
from .model.scaled_model import ScaledModel, attach
from .model.sharding import one_voice
from .training.batches import PACKINGS, Batches
from .training.draws import DENSE, SAMPLINGS, SCALE_DRAWS, SKIPS, Draws, Procedure, procedure_for
from .training.loop import LoopOptions, Run
from .training.ranks import Ranks
from .training.saves import ADAPTERS, Checkpoints
from .training.setup import (
    FINE_TUNE_TYPES,
    build_optimizer,
    choose_trained,
    learning_rate_schedule,
)
from .training.step import TrainingStep

# mlx-lm's, without what has no meaning here.
_DEFAULTS: dict[str, Any] = {
    key: value for key, value in CONFIG_DEFAULTS.items() if key not in ("model", "data", "config")
} | {
    "model": None,
    "data": None,
    "hf_dataset": None,
    "trained_length": None,
    "scale_draw": None,
    "sampling": None,
    "plain_share": None,
    "release_recipe": False,
    "scaling_learning_rate": None,
    "train_norms_and_embeddings": False,
    "packing": PACKINGS[0],
    "max_grad_norm": 0.0,
    "warmup": 0,
    "cosine": False,
    "resume": False,
    "keep": 2,
    "eval_lengths": None,
}
_AT_LEAST = {
    "batch_size": 1,
    "num_layers": -1,
    "iters": 1,
    "steps_per_report": 1,
    "steps_per_eval": 1,
    "save_every": 1,
    "grad_accumulation_steps": 1,
    "max_seq_length": 4,
    "keep": 1,
    "warmup": 0,
    "max_grad_norm": 0,
    "learning_rate": 0,
    "val_batches": -1,
    "test_batches": -1,
    "clear_cache_threshold": 0,
}
# Of the options that have no default to tell it, in a YAML file.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("lora_parameters", "optimizer_config", "lr_schedule"), dict),
    **dict.fromkeys(("model", "data", "adapter_path", "resume_adapter_file"), str),
    **dict.fromkeys(("report_to", "project_name"), str),
}
# May change from one start of a run to the next.
_FREE = {
    "adapter_path",
    "clear_cache_threshold",
    "config",
    "data",  # its tokens may not
    "eval_lengths",
    "grad_checkpoint",  # the same gradient
    "hf_dataset",
    "iters",
    "keep",
    "model",  # its weights may not
    "project_name",
    "report_to",
    "resume",
    "resume_adapter_file",  # a save has what it gave
    "save_every",
    "steps_per_eval",
    "steps_per_report",
    "test",
    "test_batches",
    "train",
    "trust_remote_code",
    "val_batches",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `mlx_lm.lora` does not have, or has otherwise."""
    flag: dict[str, Any] = {"action": "store_true", "default": None}
    parser.add_argument(
        "--data",
        help="A folder with train.jsonl, valid.jsonl and test.jsonl (text, messages, or prompt "
        "and completion), or with .txt and .md files; or OWNER/NAME of a data set on the hub.",
    )
    parser.add_argument(
        "--fine-tune-type",
        choices=FINE_TUNE_TYPES,
        help="What to train: lora or dora adapters, full weights, or the scaling alone.",
    )
    parser.add_argument(
        "--clear-cache-threshold", type=_parse_size, help=argparse.SUPPRESS, default=None
    )
    parser.add_argument(
        "--trained-length",
        type=int,
        help="With --scaling: length the base was trained at, tokens. Default: "
        "max_position_embeddings.",
    )
    parser.add_argument(
        "--scale-draw",
        choices=SCALE_DRAWS,
        help="How each step's scale is drawn. Default: what measured best for the scaling.",
    )
    parser.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        help="Which positions a step has. Default: what measured best for the scaling.",
    )
    parser.add_argument(
        "--plain-share",
        type=float,
        help="Share of the steps at scale 1 and in rows of the trained length: of --sampling "
        "dense (default: 0.25), and of skips in longer sequences (default: of clex 0.25, else 0).",
    )
    parser.add_argument(
        "--release-recipe",
        **flag,
        help="Draw as the scaling's paper does, with one learning rate for everything.",
    )
    parser.add_argument(
        "--scaling-learning-rate",
        type=float,
        help="Of the scaling's own tensors; 0 leaves them. Default: a share of --learning-rate, "
        "0.01 for clex, 1 for gene-param and where nothing else is trained.",
    )
    parser.add_argument(
        "--train-norms-and-embeddings", **flag, help="Train these as well (LongLoRA)."
    )
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        help="concat: texts end to end, cut to --max-seq-length. plain: one text a row.",
    )
    parser.add_argument("--max-grad-norm", type=float, help="Clip the gradient. Default: 0, no.")
    parser.add_argument(
        "--warmup", type=int, help="Updates of growing learning rate before the full one."
    )
    parser.add_argument("--cosine", **flag, help="Let the learning rate fall along a cosine.")
    parser.add_argument(
        "--resume", **flag, help="Go on from the newest save in --adapter-path, if there is one."
    )
    parser.add_argument("--keep", type=int, help="Saves to keep. Default: 2.")
    parser.add_argument(
        "--eval-lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="Lengths at which validation reports the perplexity.",
    )
    parser.add_argument(
        "--trust-remote-code",
        **flag,
        help="Let the tokenizer run its own Python.",
    )
    add_scaling_arguments(parser)
    for action in parser._actions:
        default = _DEFAULTS.get(action.dest)
        told = isinstance(default, int | float | str) and not isinstance(default, bool)
        if told and "efault" not in (action.help or ""):
            action.help = f"{action.help} Default: {default}."


def run(args: argparse.Namespace) -> None:
    """Train, test, or both.

    Raises:
        InputError: options, data or a folder that cannot be used.
        RunError: the loss is no longer a number, or MLX failed.
    """
    maybe_set_recommended_wired_limit()  # on Metal, as mlx_lm.lora
    group = mx.distributed.init()
    ranks = Ranks(group)
    with one_voice(group):
        with ranks.starting():
            args = with_config(args)
            check(args, processes=ranks.size)
            model, corpora, entry = _load(args)
            test = _batches(args, corpora["test"]) if args.test else None
            training = _prepare(args, model, corpora, entry, ranks) if args.train else None
            same = _same(args, corpora["train"]) if args.train else {}
            going_on = training is None or _resume(args, training, same)
        if training is not None:
            with ranks.starting():
                ranks.check_same([vars(args), same, training.progress.iteration])
            if going_on:
                training.train(same)
        if test is not None and ranks.first:
            with ranks.running():
                loss = mean_loss(model, test.some(args.test_batches))
            print(f"Test loss {loss:.3f}, Test ppl {math.exp(min(loss, 700)):.3f}.")


def with_config(args: argparse.Namespace) -> argparse.Namespace:
    """The options with what is left open taken from the YAML file, then the defaults.

    Raises:
        InputError: the file cannot be read, or has a key that no option has.
    """
    values = dict(vars(args))
    known = sorted(values.keys() | _DEFAULTS.keys())
    if args.config:
        try:
            text = Path(args.config).read_text(encoding="utf-8")
            given = yaml.load(text, yaml_loader) or {}  # noqa: S506 - a SafeLoader
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"--config {args.config} cannot be read: {error}") from error
        if not isinstance(given, dict):
            raise InputError(f"--config {args.config} is no list of `key: value` lines.")
        for key, value in given.items():
            if key not in known:
                raise InputError(
                    f"--config {args.config} has the key {key!r}, which is none of: "
                    f"{', '.join(known)}."
                )
            if values.get(key) is None:
                values[key] = value
    for key, value in _DEFAULTS.items():
        if values.get(key) is None:
            values[key] = value
    return argparse.Namespace(**values)


def check(args: argparse.Namespace, *, processes: int = 1) -> None:
    """Refuse options before anything is loaded.

    Args:
        args: from `with_config`.
        processes: how many of mlx.launch share the rows of a batch.

    Raises:
        InputError: the message names the option.
    """
    if not (args.train or args.test):
        raise InputError("Nothing to do: give --train, --test or both.")
    if args.model is None:
        raise InputError("No model: give a folder, a .gguf file or a Hugging Face id as --model.")
    if args.data is None and args.hf_dataset is None:
        raise InputError("No data: give a folder, or a data set of the hub, as --data.")
    for key, default in _DEFAULTS.items():
        value = getattr(args, key)
        number = isinstance(default, int | float) and not isinstance(default, bool)
        whole = isinstance(default, int)
        kinds = (int,) if whole else (int, float)
        if number and (not isinstance(value, kinds) or isinstance(value, bool)):
            kind = "a whole number" if whole else "a number"
            raise InputError(f"{_option(key)} must be {kind}, got {value!r}.")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise InputError(f"{_option(key)} must be true or false, got {value!r}.")
    for key, kind in _KINDS.items():
        value = getattr(args, key)
        if value is not None and not isinstance(value, kind):
            kind = "text (in quotes)" if kind is str else "a block of `key: value` lines"
            raise InputError(f"{key} must be {kind} in a YAML file, got {value!r}.")
    lengths = args.eval_lengths
    if lengths is not None and not (
        isinstance(lengths, list) and all(type(length) is int for length in lengths)
    ):
        raise InputError(
            f"--eval-lengths must be whole numbers, in a YAML file [4096, 8192], got {lengths!r}."
        )
    check_seed(args.seed)  # which may come from --config
    for key, least in _AT_LEAST.items():
        if not getattr(args, key) >= least:
            raise InputError(f"{_option(key)} must be at least {least}, got {getattr(args, key)}.")
    if args.num_layers == 0:
        raise InputError("--num-layers must be at least 1, or -1 for all, got 0.")
    if args.batch_size % processes:
        raise InputError(
            f"--batch-size {args.batch_size} does not divide among {processes} processes: give a "
            f"multiple of {processes}, or start another number of them."
        )
    share = args.scaling_learning_rate
    if share is not None and not (isinstance(share, int | float) and share >= 0):
        raise InputError(f"--scaling-learning-rate must be at least 0, got {share!r}.")
    if args.trained_length is not None and args.scaling is None:
        raise InputError("--trained-length needs --scaling; a converted model knows its own.")
    dropout = (args.lora_parameters or {}).get("dropout", 0)
    if args.grad_checkpoint and dropout:
        raise InputError(
            "--grad-checkpoint runs every layer twice, and dropout would differ between the two: "
            "set dropout to 0 in lora_parameters, or leave --grad-checkpoint out."
        )
    if args.test and args.test_batches == 0:
        raise InputError("--test-batches must be at least 1, or -1 for all, got 0.")
    if args.lr_schedule and (args.warmup or args.cosine):
        raise InputError(
            "lr_schedule stands in place of --warmup and --cosine: leave them out; it has a "
            "warmup of its own."
        )
    if args.scaling is not None and not args.train and args.adapter_path:
        raise InputError(
            f"--scaling {args.scaling}: adapters know the scaling that they were trained with. "
            "Leave the option out, or test without adapters: --adapter-path ''."
        )


def _load(args: argparse.Namespace) -> tuple[Any, dict[str, Corpus], dict[str, Any] | None]:
    """The model with its scaling, the data, and the entry of a scaling the base lacks."""
    entry = scaling_from(args)
    mx.random.seed(args.seed)
    model, tokenizer = load(
        args.model,
        adapter_path=None if args.train else (args.adapter_path or None),
        trust_remote_code=args.trust_remote_code,
    )
    if entry is not None:
        if isinstance(model, ScaledModel) and model.scaling.learned:
            raise InputError(
                f"--scaling {args.scaling}: {args.model} has a scaling with weights of its own, "
                "which this would throw away. Leave the option out, or start from the base."
            )
        attach(model, entry, trained_length=args.trained_length)
    if not isinstance(model, ScaledModel):
        raise InputError(
            f"{args.model} has no scaling of ours: say which with --scaling NAME (clex, gene, "
            "..., or none for a plain fine-tune)."
        )
    corpora = load_corpora(
        Path(args.data or ".").expanduser(),
        tokenizer,
        mask_prompt=args.mask_prompt,
        cache_dir=DEFAULT_CACHE,
        splits=(["train", "valid"] if args.train else []) + (["test"] if args.test else []),
        hf_dataset=args.hf_dataset,
    )
    for split in ("train", "test"):
        if getattr(args, split) and split not in corpora:
            source = args.data if args.hf_dataset is None else "hf_dataset"
            raise InputError(f"--data {source} has no {split} part: give {split}.jsonl.")
    return model, corpora, entry


def _prepare(
    args: argparse.Namespace,
    model: Any,
    corpora: dict[str, Corpus],
    entry: dict[str, Any] | None,
    ranks: Ranks,
) -> Run:
    checkpoints = Checkpoints(Path(args.adapter_path).expanduser(), keep=args.keep)
    if checkpoints.newest is not None and not args.resume:
        raise InputError(
            f"{args.adapter_path} holds a run already: go on with --resume, or give another "
            "--adapter-path."
        )
    stock = checkpoints.folder / ADAPTERS
    if stock.is_file() and not stock.is_symlink():
        raise InputError(
            f"{stock} is of another program, mlx_lm.lora perhaps, and would be replaced: give "
            "another --adapter-path."
        )
    share = _scaling_share(args, model)
    extra = choose_trained(
        model,
        fine_tune_type=args.fine_tune_type,
        num_layers=args.num_layers,
        lora_parameters=args.lora_parameters,
        scaling=share > 0,
        norms_and_embeddings=args.train_norms_and_embeddings,
    )
    going_on = args.resume and checkpoints.newest is not None
    if args.resume_adapter_file is not None and not going_on:
        _load_adapters(model, Path(args.resume_adapter_file).expanduser())
    print_trainable_parameters(model)

    if args.scaling_learning_rate and not model.scaling.learned:
        raise InputError(
            f"--scaling-learning-rate: {type(model.scaling).__name__} has nothing to learn. Leave "
            "it out."
        )
    batches = _batches(args, corpora["train"])
    if batches.cut or batches.mute:
        _say(
            f"Of {len(corpora['train'].starts)} texts {batches.cut} are longer than "
            f"--max-seq-length {args.max_seq_length} and lose their end (--packing concat keeps "
            f"it); {batches.mute} have nothing within it to learn, and are left out."
        )
    procedure = _procedure(args, model)
    if args.plain_share and procedure.sampling not in (DENSE, SKIPS):
        raise InputError(
            f"--plain-share is for --sampling dense and skips, not {procedure.sampling}."
        )
    draws = Draws(model.scaling, procedure, np.random.default_rng(args.seed))
    draws.check(args.max_seq_length)
    valid = corpora.get("valid")
    lengths = tuple(args.eval_lengths or ())
    if lengths and valid is None:
        raise InputError(f"--eval-lengths needs validation data; {args.data} has none.")
    if valid is not None:
        check_lengths(model, valid, lengths)
    updates = -(-args.iters // args.grad_accumulation_steps)
    schedule = learning_rate_schedule(
        args.learning_rate,
        updates=updates,
        warmup=args.warmup,
        cosine=args.cosine,
        config=args.lr_schedule,
    )
    optimizer = build_optimizer(
        args.optimizer,
        (args.optimizer_config or {}).get(args.optimizer) or {},
        schedule,
        scaling_share=share,
    )
    callback: Any = _reporting(args) if ranks.first else None
    training = Run(
        step=TrainingStep(
            model,
            optimizer,
            grad_checkpoint=args.grad_checkpoint,
            max_grad_norm=args.max_grad_norm,
            group=ranks.group,
        ),
        draws=draws,
        batches=batches,
        options=LoopOptions(
            iters=args.iters,
            grad_accumulation_steps=args.grad_accumulation_steps,
            steps_per_report=args.steps_per_report,
            steps_per_eval=args.steps_per_eval,
            save_every=args.save_every,
            val_batches=args.val_batches,
            eval_lengths=lengths,
            clear_cache_threshold=args.clear_cache_threshold,
        ),
        checkpoints=checkpoints,
        config=_adapter_config(args, model, entry),
        valid=_valid_batches(args, valid),
        valid_corpus=valid,
        extra=extra,
        seed=args.seed,
        ranks=ranks,
    )
    if callback is not None:
        training.on_report = callback.on_train_loss_report
        training.on_validation = callback.on_val_loss_report
    return training


def _load_adapters(model: Any, file: Path) -> None:
    """Start from adapters, and from what was saved beside them."""
    files = [file, *(file.with_name(name) for name in (ADAPTER_SCALING, EXTRA_WEIGHTS))]
    for part in files[:1] + [other for other in files[1:] if other.is_file()]:
        try:
            weights: Any = mx.load(str(part))
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"--resume-adapter-file {part} does not load: {error}") from error
        trained: Any = tree_flatten(model.trainable_parameters())
        shapes = {name: value.shape for name, value in trained}
        for name, value in sorted(weights.items()):
            if shapes.get(name) != value.shape:
                here = f"trains as {shapes[name]}" if name in shapes else "does not train"
                raise InputError(
                    f"--resume-adapter-file {part} has {name} as {value.shape}, which this run "
                    f"{here}: give the options that it was made with."
                )
        model.load_weights(list(weights.items()), strict=False)


def _resume(args: argparse.Namespace, training: Run, same: dict[str, Any]) -> bool:
    """Whether there is something left to do, after going back to the last save."""
    if not args.resume:
        return True
    if not training.resume(same):
        _say(f"{args.adapter_path} has no save yet; starting at iteration 0.")
        return True
    iteration = training.progress.iteration
    if iteration >= args.iters:
        _say(f"{args.adapter_path} has all {iteration} iterations already.")
        return False
    _say(f"Going on after iteration {iteration}.")
    return True


def _scaling_share(args: argparse.Namespace, model: Any) -> float:
    """The scaling's learning rate / the model's."""
    if args.scaling_learning_rate is None:
        whole = args.release_recipe or args.fine_tune_type == "scaling"
        return 1.0 if whole else model.scaling.learning_rate_share
    if not args.scaling_learning_rate:
        return 0.0
    rate = args.learning_rate
    if args.lr_schedule:
        try:
            rate = float(args.lr_schedule["arguments"][0])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"lr_schedule cannot be used: {error!r}.") from error
    if not rate:
        raise InputError("--scaling-learning-rate needs a --learning-rate above 0.")
    return args.scaling_learning_rate / rate


def _procedure(args: argparse.Namespace, model: Any) -> Procedure:
    default = procedure_for(model.scaling, released=args.release_recipe)
    return Procedure(
        scale_draw=args.scale_draw or default.scale_draw,
        sampling=args.sampling or default.sampling,
        plain_share=default.plain_share if args.plain_share is None else args.plain_share,
    )


def _batches(args: argparse.Namespace, corpus: Corpus) -> Batches:
    return Batches(
        corpus,
        packing=args.packing,
        length=args.max_seq_length,
        batch_size=args.batch_size,
        seed=args.seed,
    )


def _valid_batches(args: argparse.Namespace, corpus: Corpus | None) -> Batches | None:
    """Batches to validate on, or None, said aloud, where there is too little."""
    if corpus is None:
        _say("No validation data; training goes on without.")
        return None
    if args.val_batches == 0:
        return None
    try:
        return _batches(args, corpus)
    except InputError as error:
        if args.eval_lengths:
            raise
        _say(f"Training goes on without validation: {error}")
        return None


def _reporting(args: argparse.Namespace) -> Any:
    try:
        return get_reporting_callbacks(
            args.report_to,
            project_name=args.project_name,
            log_dir=args.adapter_path,
            config=vars(args),
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"--report-to {args.report_to}: {error}") from error


def _adapter_config(
    args: argparse.Namespace, model: Any, entry: dict[str, Any] | None
) -> dict[str, Any]:
    """What mlx-lm's loader reads, the options, and the scaling that the base lacks."""
    config = {key: value for key, value in vars(args).items() if key in _DEFAULTS}
    if args.num_layers <= 0 or args.num_layers > len(model.layers):
        config["num_layers"] = len(model.layers)
    if args.fine_tune_type == "scaling":
        # For mlx-lm's loader: adapters in no layer.
        config["lora_parameters"] = {**args.lora_parameters, "keys": []}
    config["base_weights"] = weights_digest(resolve(args.model))
    if entry is not None:
        config["rope_scaling"] = {**entry, **vars(model.scaling.config)}
        config["trained_length"] = model.scaling.trained_length
    return config


def _same(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """What a resumed run must have in common with the one before."""
    free = _FREE - {"iters"} if args.cosine else _FREE  # it is the cosine's length
    settings = {key: value for key, value in vars(args).items() if key not in free}
    folder = resolve(args.model)
    config = json.dumps(read_config(folder), sort_keys=True)
    digest = hashlib.sha256(f"{config} {weights_digest(folder)}".encode())
    ends = np.concatenate([corpus.tokens[: 1 << 20], corpus.tokens[-(1 << 20) :]])
    return settings | {
        "the model": digest.hexdigest()[:16],
        "the training data": f"{len(corpus.tokens)} tokens, {zlib.crc32(ends.tobytes()):08x}",
    }


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")


def _say(text: str) -> None:
    print(f"[mlx_clex] {text}", file=sys.stderr)


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(
        run_command(
            add_arguments,
            run,
            prog="mlx_clex.lora",
            description="Fine-tune a model for texts longer than it was trained on.",
            parents=[build_parser()],
        )
    )


if __name__ == "__main__":
    main()
