"""Prepare a run of training and testing from its options.

Loads the model and the data, refuses what cannot be done, decides what is trained, and goes
back to the last save where the run goes on.

Not covered: the run itself (`loop.py`), and what is printed about it (`job.py`).
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks

from ..checkpoint.adapters import read_adapters
from ..checkpoint.digest import weights_digest
from ..checkpoint.files import expand
from ..data.corpus import FEATURES, Corpus, load_corpora
from ..errors import InputError, say
from ..evaluation.perplexity import check_lengths, check_targets
from ..loading import DEFAULT_CACHE, load, resolve
from ..model.own_rope import say_if_dropped
from ..model.scaled_model import ScaledModel, attach
from ..scaling.procedure import SKIPPING, Procedure
from .batches import Batches
from .best import Best
from .draws import Draws
from .job import Job
from .loop import Run
from .options import DEFAULT_LENGTH, PAYING_LENGTH, TWO_STAGE, TrainingOptions
from .ranks import Ranks
from .recipe import with_stage_2
from .resume import (
    adapters_below,
    check_scaling_below,
    go_on,
    load_adapters,
    names_of_adapters,
    open_folder,
    settings_to_keep,
    untrained_scaling,
)
from .saves import Checkpoints
from .setup import build_optimizer, check_family, choose_trained, highest, learning_rate_schedule
from .step import TrainingStep


def prepare(
    options: TrainingOptions,
    entry: dict[str, Any] | None,
    ranks: Ranks,
    before_reading: Callable[[nn.Module], None] | None = None,
) -> Job:
    """Load and check everything a run needs.

    Args:
        options: what to do.
        entry: rope_scaling of a scaling to switch on, for a base that has none.
        ranks: the processes that share the rows of a batch.
        before_reading: called with the model before its weights are read; see `load`.

    Raises:
        InputError: options, data or a folder that cannot be used.
    """
    _check(options, entry, ranks.size)
    checkpoints = open_folder(options) if options.train else None
    mx.random.seed(options.seed)
    below = adapters_below(options)
    model, tokenizer = _load_model(options, entry, below, before_reading)
    corpora = _load_data(options, tokenizer)
    draws = _draws(options, model) if options.train else None
    if options.recipe == TWO_STAGE and options.train:
        options = with_stage_2(options, model, corpora["train"], corpora.get("valid"))
    options = replace(options, max_seq_length=_length(options, model, draws))
    test = _batches(options, corpora["test"]) if options.test else None
    if draws is None or checkpoints is None:
        return Job(options=options, model=model, ranks=ranks, test=test)
    train, valid = corpora["train"], corpora.get("valid")
    learning_rate, share = _learning_rates(options, model)
    extra, kept = _start(options, model, checkpoints, below, scaling=share > 0)
    batches = _train_batches(options, train)
    _check_validation(options, model, valid)
    training = Run(
        step=_step(options, model, learning_rate, share, ranks),
        callback=_reporting(options, entry, ranks),
        draws=draws,
        batches=batches,
        options=options,
        checkpoints=checkpoints,
        config=_adapter_config(options, model, entry, below),
        valid=_valid_batches(options, valid),
        valid_corpus=valid,
        extra=extra,
        kept=kept,
        best=Best() if options.keep_best else None,
        ranks=ranks,
    )
    same = settings_to_keep(options, entry, corpora, below)
    return Job(
        options=options,
        model=model,
        ranks=ranks,
        entry=entry,
        training=training,
        corpus=train,
        going_on=go_on(options, training, same),
        same=same,
        test=test,
    )


def _check(options: TrainingOptions, entry: dict[str, Any] | None, processes: int) -> None:
    """Refuse what is missing, and what does not go together, before anything is loaded."""
    if not (options.train or options.test):
        raise InputError("Nothing to do: give --train, --test or both.")
    if options.model is None:
        raise InputError("No model: give a folder, a .gguf file or a Hugging Face id as --model.")
    if options.data is None and options.hf_dataset is None:
        raise InputError("No data: give a folder, or a data set of the hub, as --data.")
    if options.batch_size % processes:
        raise InputError(
            f"--batch-size {options.batch_size} does not divide among {processes} processes: give "
            f"a multiple of {processes}, or start another number of them."
        )
    if options.trained_length is not None and entry is None:
        raise InputError("--trained-length needs --scaling; a converted model knows its own.")
    if options.own_rope is not None and entry is None:
        raise InputError("--own-rope needs --scaling NAME: add it.")
    if entry is not None and not options.train and options.adapter_path:
        raise InputError(
            f"--scaling {entry['type']}: adapters know the scaling that they were trained with. "
            "Leave the option out, or test without adapters: --adapter-path ''."
        )


def _load_model(
    options: TrainingOptions,
    entry: dict[str, Any] | None,
    below: Path | None,
    before_reading: Callable[[nn.Module], None] | None,
) -> tuple[Any, Any]:
    """Load the model with its scaling, and its tokenizer."""
    assert options.model is not None
    model, tokenizer = load(
        options.model,
        adapter_path=below or (None if options.train else options.adapter_path or None),
        trust_remote_code=options.trust_remote_code,
        before_reading=before_reading,
    )
    if below and isinstance(model, ScaledModel):
        check_scaling_below(options, entry, model.scaling, below)
    elif entry is not None:
        if isinstance(model, ScaledModel) and model.scaling.learned:
            raise InputError(
                f"--scaling {entry['type']}: {options.model} has a scaling with weights of its "
                "own, which this would throw away. Leave the option out, or start from the base."
            )
        say_if_dropped(model, options.own_rope)
        attach(model, entry, trained_length=options.trained_length, own_rope=options.own_rope)
    if not isinstance(model, ScaledModel):
        if options.train:
            raise InputError(
                f"{options.model} was not converted with mlx_clex: give --scaling NAME (clex, "
                "gene, ..., or none for a plain fine-tune)."
            )
        attach(model, {"type": "none"})
    check_family(model)
    return model, tokenizer


def _load_data(options: TrainingOptions, tokenizer: Any) -> dict[str, Corpus]:
    """Load the parts of the data that the run needs, by name."""
    parts = (["train", "valid"] if options.train else []) + (["test"] if options.test else [])
    corpora = load_corpora(
        expand(options.data or "."),
        tokenizer,
        mask_prompt=options.mask_prompt,
        cache_dir=DEFAULT_CACHE,
        splits=parts,
        hf_dataset=options.hf_dataset,
        features={name: getattr(options, name) for name in FEATURES},
    )
    for part in (part for part in parts if part not in (*corpora, "valid")):
        source = options.data if options.hf_dataset is None else "hf_dataset"
        raise InputError(f"--data {source} has no {part} part: give {part}.jsonl.")
    return corpora


def _draws(options: TrainingOptions, model: Any) -> Draws:
    scaling = model.scaling
    default = scaling.released_procedure if options.release_recipe else scaling.procedure
    share = options.plain_share
    procedure = Procedure(
        scale_draw=options.scale_draw or default.scale_draw,
        sampling=options.sampling or default.sampling,
        plain_share=default.plain_share if share is None else share,
    )
    if share and procedure.sampling not in SKIPPING:
        raise InputError(
            f"--plain-share is for --sampling {' and '.join(SKIPPING)}, not {procedure.sampling}."
        )
    return Draws(scaling, procedure, np.random.default_rng(options.seed))


def _length(options: TrainingOptions, model: Any, draws: Draws | None) -> int:
    """The length of the sequences: what was asked for, or a default that can be used."""
    if options.max_seq_length is not None:
        length = options.max_seq_length
    else:
        longest = draws.longest if draws else model.reach if model.scaling.hard_reach else None
        limits = {longest or DEFAULT_LENGTH: "the scaling allows no more"}
        if draws and draws.procedure.sampling in SKIPPING:
            enough = PAYING_LENGTH * model.scaling.trained_length
            limits[enough] = f"{PAYING_LENGTH} trained lengths, which measured best"
        length = min(DEFAULT_LENGTH, *limits)
        if length < DEFAULT_LENGTH:
            say(f"--max-seq-length is {length} tokens: {limits[length]}.")
    if draws:
        draws.check(length)
    return length


def _learning_rates(options: TrainingOptions, model: Any) -> tuple[Any, float]:
    """The learning rate of the model, a number or a schedule; that of the scaling / the model's."""
    updates = -(-options.iters // options.grad_accumulation_steps)
    schedule = learning_rate_schedule(
        options.learning_rate,
        updates=updates,
        warmup=options.warmup,
        cosine=options.cosine,
        config=options.lr_schedule,
    )
    rate = highest(schedule, updates) if options.lr_schedule else options.learning_rate
    return schedule, _scaling_share(options, model, rate)


def _scaling_share(options: TrainingOptions, model: Any, rate: float) -> float:
    """The learning rate of the scaling / that of the model, whose highest is `rate`."""
    own = options.scaling_learning_rate
    if own is None:
        whole = options.release_recipe or options.fine_tune_type == "scaling"
        return 1.0 if whole else model.scaling.learning_rate_share
    if not own:
        return 0.0
    if not model.scaling.learned:
        raise InputError(
            f"--scaling-learning-rate: {model.scaling.name} has nothing to learn. Leave it out."
        )
    if not rate:
        raise InputError("--scaling-learning-rate needs a --learning-rate above 0.")
    return own / rate


def _start(
    options: TrainingOptions,
    model: Any,
    checkpoints: Checkpoints,
    below: Path | None,
    *,
    scaling: bool,
) -> tuple[frozenset[str], frozenset[str]]:
    """Choose what is trained, and start from earlier adapters; return `extra` and `kept` of `Run`.

    Args:
        scaling: train the tensors of the scaling, if it has any.
    """
    extra = choose_trained(
        model,
        fine_tune_type=options.fine_tune_type,
        num_layers=options.num_layers,
        lora_parameters=options.lora_parameters,
        scaling=scaling,
        norms_and_embeddings=options.train_norms_and_embeddings,
    )
    kept: frozenset[str] = frozenset()
    if below:
        kept, norms_and_embeddings = names_of_adapters(below)
        extra |= norms_and_embeddings
    elif options.resume and checkpoints.newest is not None:
        kept = untrained_scaling(model, checkpoints.newest)
    elif options.resume_adapter_file is not None:
        given = expand(options.resume_adapter_file)
        load_adapters(model, given, options)
        kept = untrained_scaling(model, given if given.is_dir() else given.parent)
    return extra, kept


def _check_validation(options: TrainingOptions, model: Any, valid: Corpus | None) -> None:
    """Refuse lengths that the validation data or the model do not have."""
    lengths, trained = options.eval_lengths or [], model.scaling.trained_length
    if options.keep_best and not any(n > trained for n in lengths):
        raise InputError(
            f"--keep-best needs --eval-lengths beyond the trained length of {trained} tokens."
        )
    if lengths and valid is None:
        raise InputError(f"--eval-lengths needs validation data; {options.data} has none.")
    if valid is not None:
        check_lengths(model, valid, lengths, "--eval-lengths")
        check_targets(valid, lengths, trained, "--eval-lengths")


def _batches(options: TrainingOptions, corpus: Corpus) -> Batches:
    assert options.max_seq_length is not None
    return Batches(
        corpus,
        packing=options.packing,
        length=options.max_seq_length,
        batch_size=options.batch_size,
        seed=options.seed,
    )


def _train_batches(options: TrainingOptions, corpus: Corpus) -> Batches:
    """Batches to train on, and a line that says what of the texts they leave out."""
    batches = _batches(options, corpus)
    if batches.cut or batches.mute:
        say(
            f"{batches.cut} of {len(corpus.starts)} texts are longer than "
            f"--max-seq-length {options.max_seq_length} and lose their end (--packing concat "
            f"keeps it); {batches.mute} have nothing within it to learn, and are left out."
        )
    return batches


def _valid_batches(options: TrainingOptions, corpus: Corpus | None) -> Batches | None:
    """Batches to validate on; None, and a line that says so, where there is too little text."""
    if corpus is None:
        say("No validation data; training goes on without.")
        return None
    if options.val_batches == 0:
        return None
    try:
        return _batches(options, corpus)
    except InputError as error:
        if options.eval_lengths:
            raise
        say(f"Training goes on without validation: {error}")
        return None


def _step(
    options: TrainingOptions, model: Any, learning_rate: Any, share: float, ranks: Ranks
) -> TrainingStep:
    """The step of a model whose trained parameters are chosen; rates from `_learning_rates`."""
    optimizer = build_optimizer(
        options.optimizer,
        options.optimizer_config.get(options.optimizer) or {},
        learning_rate,
        scaling_share=share,
    )
    return TrainingStep(
        model,
        optimizer,
        grad_checkpoint=options.grad_checkpoint,
        max_grad_norm=options.max_grad_norm,
        group=ranks.group,
    )


def _reporting(
    options: TrainingOptions, entry: dict[str, Any] | None, ranks: Ranks
) -> TrainingCallback:
    """The services of --report-to; only the first process reports."""
    try:
        services = get_reporting_callbacks(
            options.report_to if ranks.first else None,
            project_name=options.project_name,
            log_dir=options.adapter_path,
            config=asdict(options) | {"rope_scaling": entry},
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"--report-to {options.report_to}: {error}") from error
    return services or TrainingCallback()


def _adapter_config(
    options: TrainingOptions, model: Any, entry: dict[str, Any] | None, below: Path | None
) -> dict[str, Any]:
    """What mlx-lm's loader reads, the options, and the scaling that the base lacks."""
    config = asdict(options)
    if options.num_layers <= 0 or options.num_layers > len(model.layers):
        config["num_layers"] = len(model.layers)
    if below:
        _, settings = read_adapters(below)
        kept: tuple[str, ...] = ("fine_tune_type", "num_layers", "lora_parameters")
        if settings.get("rope_scaling"):
            kept, entry = (*kept, "rope_scaling", "trained_length", "own_rope"), None
        config |= {key: settings.get(key) for key in kept}
    elif options.fine_tune_type == "scaling":
        # For mlx-lm's loader: adapters in no layer.
        config["lora_parameters"] = {**options.lora_parameters, "keys": []}
    config["base_weights"] = weights_digest(resolve(config["model"]))
    if entry is not None:
        config["rope_scaling"] = model.scaling.entry()
        config["trained_length"] = model.scaling.trained_length
    return config
