"""The options of training: default, unit, range, choices and help text of each.

Everything else reads the fields of `TrainingOptions`: the command line, the keys of a YAML
file, the checks of types and ranges, the settings that a resumed run must keep, and
adapter_config.json. Names and defaults are those of `mlx_lm.lora` where it has the option.

Not covered: the options of a scaling, which are the fields of its config.
"""

# ruff: noqa: RUF009 - `option` makes a dataclass field

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..diagnosis.machine import parse_size
from ..errors import InputError
from ..model.own_rope import OWN_ROPE_HELP, OWN_ROPES
from ..scaling import SCALINGS
from ..scaling.procedure import SAMPLINGS, SCALE_DRAWS
from .batches import PACKINGS
from .option_fields import option, options_of
from .setup import FINE_TUNE_TYPES, OPTIMIZERS

DEFAULT_LENGTH = 2048  # tokens of a sequence, as mlx_lm.lora
PAYING_LENGTH = 4  # longest default with jumps / trained length; longer sequences gain little
SINGLE, TWO_STAGE = "single", "two-stage"  # recipes

_TASK = "task"
_DATA = "model and data"
_TRAINED = "what is trained"
_DRAWN = "scales and positions of the steps"
_UPDATES = "steps and learning rate"
_MEASURED = "validation and test"
_SAVED = "saves and reports"
_MEMORY = "memory"
# Scalings whose tensors train at another learning rate than the model.
_SHARES = "".join(
    f"; for {name} {f'{kind.learning_rate_share:g} times it' if kind.learning_rate_share else '0'}"
    for name, kind in SCALINGS.items()
    if kind.learning_rate_share != 1
)


def _listed(choices: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in choices.items())


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a run of training and testing is asked to do.

    Raises:
        InputError: a value has the wrong type or is out of its range, or two exclude each other.
    """

    train: bool = option(False, _TASK, "Train the model.", may_change=True)
    test: bool = option(
        False, _TASK, "Report the loss of the test part, after training if any.", may_change=True
    )

    model: str | None = option(
        None,
        _DATA,
        "The base: a folder, a .gguf file, a Hugging Face id, or bundled:NAME.",
        default_text="none; must be given",
        may_change=True,  # its weights may not
    )
    data: str | None = option(
        None,
        _DATA,
        "A folder with train.jsonl, valid.jsonl and test.jsonl (text, messages, or prompt and "
        "completion), or with .txt and .md files; or OWNER/NAME of a data set on the hub.",
        default_text="none; must be given",
        may_change=True,  # its tokens may not
    )
    hf_dataset: Any = option(
        None,
        _DATA,
        "Data sets of the hub and the names of their columns, as in mlx_lm.lora.",
        default_text="none",
        only_yaml=True,
        may_change=True,  # its tokens may not
    )
    prompt_feature: str = option("prompt", _DATA, "The key of prompts in --data.", only_yaml=True)
    completion_feature: str = option("completion", _DATA, "That of completions.", only_yaml=True)
    text_feature: str = option("text", _DATA, "That of plain texts.", only_yaml=True)
    chat_feature: str = option("messages", _DATA, "That of chats.", only_yaml=True)
    mask_prompt: bool = option(False, _DATA, "Leave prompts out of the loss.")
    packing: str = option(
        "concat",
        _DATA,
        "concat: texts end to end, cut to --max-seq-length. plain: one text a row.",
        choices=PACKINGS,
    )
    max_seq_length: int | None = option(
        None,
        _DATA,
        "Length of the sequences, or of the longest with --packing plain.",
        least=4,
        default_text=f"{DEFAULT_LENGTH} tokens; if less, {PAYING_LENGTH} trained lengths with "
        "--sampling skips and cream, or what the scaling can be trained at",
    )
    batch_size: int = option(
        4, _DATA, "Sequences in a batch, of all processes together.", unit="sequences", least=1
    )
    seed: int = option(0, _DATA, "Seed of all random numbers.")
    trust_remote_code: bool = option(
        False, _DATA, "Let the tokenizer run Python code of the checkpoint.", may_change=True
    )

    fine_tune_type: str = option(
        "lora",
        _TRAINED,
        "lora or dora adapters, full weights, or the scaling alone.",
        choices=FINE_TUNE_TYPES,
    )
    recipe: str = option(
        SINGLE,
        _TRAINED,
        "single: one run. two-stage: the weights with the scaling's network left as it is, then "
        "the network alone on real long rows, as far as that helps (for clex).",
        choices=(SINGLE, TWO_STAGE),
    )
    stage_2_iters: int = option(
        200,
        _TRAINED,
        "Iterations of stage 2, each of one row in each process; an update has four rows or more.",
        unit="iterations",
        least=4,
    )
    stage_2_length: int | None = option(
        None,
        _TRAINED,
        "Tokens of a row of stage 2. Its memory grows with them.",
        least=4,
        default_text="32 trained lengths, or the reach or the longest text, if less",
    )
    training_mode: str = option(
        "normal",
        _TRAINED,
        "What to minimise: normal, the loss of each token.",
        choices=("normal",),
        only_yaml=True,
        may_change=True,
    )
    num_layers: int = option(
        16,
        _TRAINED,
        "How many of the last layers to train; -1: all.",
        unit="layers",
        least=1,
        or_all=True,
    )
    lora_parameters: dict[str, Any] = option(
        {"rank": 8, "dropout": 0.0, "scale": 20.0},
        _TRAINED,
        "rank, scale and dropout of the adapters, and keys, the names of the adapted modules.",
        only_yaml=True,
    )
    train_norms_and_embeddings: bool = option(
        False, _TRAINED, "Train norms and embeddings of all layers as well, as LongLoRA."
    )

    trained_length: int | None = option(
        None,
        _DRAWN,
        "With --scaling: the length that the base was trained at.",
        least=2,
        default_text="max_position_embeddings",
    )
    own_rope: str | None = option(
        None, _DRAWN, f"With --scaling: {OWN_ROPE_HELP}", choices=OWN_ROPES, default_text="keep"
    )
    scale_draw: str | None = option(
        None,
        _DRAWN,
        f"How the scale of a step is drawn. {_listed(SCALE_DRAWS)}.",
        choices=tuple(SCALE_DRAWS),
        default_text="what measured best for the scaling",
    )
    sampling: str | None = option(
        None,
        _DRAWN,
        f"Which positions a step has. {_listed(SAMPLINGS)}.",
        choices=tuple(SAMPLINGS),
        default_text="what measured best for the scaling",
    )
    plain_share: float | None = option(
        None,
        _DRAWN,
        "Share of plain steps with --sampling skips or cream and sequences longer than the trained "
        "length: rows are cut to the trained length and have positions 0, 1, 2, ...",
        least=0,
        below=1,
        default_text="what measured best for the scaling",
    )
    release_recipe: bool = option(
        False,
        _DRAWN,
        "Draw as the scaling's paper does, with one learning rate for everything.",
    )

    iters: int = option(
        1000,
        _UPDATES,
        "Iterations to run, each of one batch.",
        unit="iterations",
        least=1,
        may_change=True,
    )
    grad_accumulation_steps: int = option(
        1, _UPDATES, "Batches whose gradients are added up for one update.", least=1
    )
    learning_rate: float = option(1e-5, _UPDATES, "The learning rate.", least=0)
    scaling_learning_rate: float | None = option(
        None,
        _UPDATES,
        "The learning rate of the scaling's own tensors; 0 leaves them as they are.",
        least=0,
        default_text=f"--learning-rate{_SHARES}, unless --release-recipe or --fine-tune-type "
        "scaling is given",
    )
    warmup: int = option(
        0, _UPDATES, "Let the learning rate grow from 0 at the start.", unit="updates", least=0
    )
    cosine: bool = option(False, _UPDATES, "Let the learning rate fall to 0 along a half cosine.")
    lr_schedule: dict[str, Any] | None = option(
        None,
        _UPDATES,
        "A schedule of mlx_lm.lora, in place of warmup and cosine.",
        default_text="none",
        only_yaml=True,
    )
    max_grad_norm: float = option(
        0.0,
        _UPDATES,
        "Clip the gradient to this norm, the scaling's and all others' each; 0: no clipping.",
        least=0,
    )
    optimizer: str = option("adam", _UPDATES, "The optimizer.", choices=tuple(OPTIMIZERS))
    optimizer_config: dict[str, Any] = option(
        {name: {} for name in OPTIMIZERS},
        _UPDATES,
        "Settings of each optimizer by its name, such as adamw: {weight_decay: 0.1}.",
        default_text="none",
        only_yaml=True,
    )

    val_batches: int = option(
        25,
        _MEASURED,
        "Batches of a validation; -1: all, 0: none.",
        unit="batches",
        least=0,
        or_all=True,
        may_change=True,
    )
    steps_per_eval: int = option(
        200,
        _MEASURED,
        "From one validation to the next.",
        unit="iterations",
        least=1,
        may_change=True,
    )
    eval_lengths: list[int] | None = option(
        None,
        _MEASURED,
        "Lengths in tokens, from the trained length on, at which a validation reports the "
        "perplexity of the same tokens.",
        default_text="none",
        may_change=True,
    )
    keep_best: bool = option(
        False,
        _MEASURED,
        "End with the weights of the best validation at --eval-lengths beyond the trained length, "
        "the start included.",
    )
    test_batches: int = option(
        500,
        _MEASURED,
        "Batches of the test part; -1: all.",
        unit="batches",
        least=0,
        or_all=True,
        may_change=True,
    )

    adapter_path: str = option(
        "adapters", _SAVED, "The folder of a run: its saves and its log.", may_change=True
    )
    resume: bool = option(
        False,
        _SAVED,
        "Go on from the newest save in --adapter-path, if there is one.",
        may_change=True,
    )
    resume_adapter_file: str | None = option(
        None,
        _SAVED,
        "Start a new run from a folder of adapters, or from one file in it.",
        default_text="none",
        may_change=True,  # a save holds what it gave; under a scaling, its tensors may not
    )
    save_every: int = option(
        100, _SAVED, "From one save to the next.", unit="iterations", least=1, may_change=True
    )
    keep: int = option(2, _SAVED, "Newest saves to keep.", unit="saves", least=1, may_change=True)
    steps_per_report: int = option(
        10,
        _SAVED,
        "From one printed loss to the next.",
        unit="iterations",
        least=1,
        may_change=True,
    )
    report_to: str | None = option(
        None,
        _SAVED,
        "Services to report to: wandb, swanlab, or wandb,swanlab.",
        default_text="none",
        may_change=True,
    )
    project_name: str | None = option(
        None,
        _SAVED,
        "Name of the project there.",
        default_text="name of the working directory",
        may_change=True,
    )

    grad_checkpoint: bool = option(
        False,
        _MEMORY,
        "Compute the inside of each layer again in the backward pass instead of keeping it.",
        may_change=True,  # the gradient is the same
    )
    clear_cache_threshold: int = option(
        0,
        _MEMORY,
        "Memory that MLX may keep for reuse between steps, in bytes or as 4GB.",
        unit="bytes",
        least=0,
        may_change=True,
        parse=parse_size,
    )

    def __post_init__(self) -> None:
        for item in options_of(TrainingOptions):
            item.check(getattr(self, item.name))
        if self.num_layers == 0:
            raise InputError("--num-layers must be at least 1, or -1 for all, got 0.")
        if self.test and self.test_batches == 0:
            raise InputError("--test-batches must be at least 1, or -1 for all, got 0.")
        if self.grad_checkpoint and self.lora_parameters.get("dropout"):
            raise InputError(
                "--grad-checkpoint runs every layer twice, and dropout would differ between the "
                "two: set dropout to 0 in lora_parameters, or leave --grad-checkpoint out."
            )
        if self.lr_schedule and (self.warmup or self.cosine):
            raise InputError(
                "lr_schedule stands in place of --warmup and --cosine: leave them out; it has a "
                "warmup of its own."
            )

    @classmethod
    def of(cls, args: argparse.Namespace) -> "TrainingOptions":
        """Take the options out of parsed arguments; those that are None get their defaults."""
        given = {item.name: getattr(args, item.name, None) for item in options_of(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def lasting(self) -> dict[str, Any]:
        """The settings that a resumed run must have in common with the run before."""
        # The length of a cosine decides each of its learning rates; the lengths of validation
        # decide what is the best.
        own_rate = self.lr_schedule and self.scaling_learning_rate  # a share of the highest
        fixed = {"iters": self.cosine or own_rate, "eval_lengths": self.keep_best}
        return {
            item.name: getattr(self, item.name)
            for item in options_of(TrainingOptions)
            if not item.spec.may_change or fixed.get(item.name)
        }
