"""Recipes: one command that does several runs, each a set of options.

`two-stage` is for scalings with a network, such as CLEX. Stage 1 trains the model's weights on
positions with jumps and leaves the network as it is. Stage 2 trains the network alone, on real
long rows: each is cut into pieces of a drawn length, and an update has the mean gradient of
several. It ends with the network of the best validation at long lengths, which may be the untrained
one.

Not covered: a run itself (`prepare.py`, `loop.py`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.corpus import Corpus
from ..errors import InputError
from ..evaluation.perplexity import check_targets
from ..scaling.procedure import FIXED, PIECES
from .options import TWO_STAGE, TrainingOptions

_FIRST = "stage-1"  # folder of stage 1 in that of the run
_UPDATE = 4  # rows whose gradients make an update of stage 2
_VALIDATIONS = 5  # of stage 2
_LONGEST = 32  # default row of stage 2 / trained length
# The learning rate of stage 2. At ten times this rate, long texts get worse.
_LEARNING_RATE = 1e-5


def stages(options: TrainingOptions, processes: int = 1) -> list[TrainingOptions]:
    """Return the options of each run, in order.

    Args:
        options: of the command.
        processes: how many share the rows of a batch.
    """
    if options.recipe != TWO_STAGE or not options.train:
        return [options]
    first = Path(options.adapter_path) / _FIRST
    iters, rate = options.stage_2_iters, options.scaling_learning_rate
    network: dict[str, Any] = {
        "fine_tune_type": "scaling",
        "resume_adapter_file": str(first),
        "train_norms_and_embeddings": False,
        "scale_draw": FIXED,
        "sampling": PIECES,
        "plain_share": None,
        "packing": "concat",
        "batch_size": processes,
        "iters": iters,
        "grad_accumulation_steps": max(1, _UPDATE // processes),
        "learning_rate": _LEARNING_RATE if rate is None else rate,
        "scaling_learning_rate": None,
        "lr_schedule": None,
        "warmup": 0,
        "cosine": False,
        "val_batches": 1,
        "steps_per_eval": max(1, iters // _VALIDATIONS),
        "keep_best": True,
        "test": False,  # its texts are loaded and checked before stage 1
    }
    return [
        replace(
            options,
            adapter_path=str(first),
            scaling_learning_rate=0.0,
            keep_best=False,
        ),
        replace(options, **network),
    ]


def with_stage_2(
    options: TrainingOptions, model: Any, train: Corpus, valid: Corpus | None
) -> TrainingOptions:
    """Return options with the lengths of stage 2; refuse, before stage 1, what it cannot do.

    Raises:
        InputError: a scaling without a network, or texts too short for the rows.
    """
    scaling = model.scaling
    if not scaling.learned or scaling.by_layer:
        raise InputError(
            f"--recipe {TWO_STAGE} trains the network of a scaling, and {scaling.name} has none. "
            "Use clex, or leave the option out."
        )
    largest = int((train.ends - train.starts).max())
    longest = min(largest, _LONGEST * scaling.trained_length, scaling.reach or largest)
    length = options.stage_2_length or longest // scaling.trained_length * scaling.trained_length
    if length < 2 * scaling.trained_length or length > largest:
        raise InputError(
            f"--stage-2-length {length} must be at least {2 * scaling.trained_length} tokens, "
            f"twice the trained length, and at most {largest}, the longest training text."
        )
    if valid is None:
        raise InputError(
            f"--recipe {TWO_STAGE} keeps the network of the best validation, and there is no "
            "validation data. Give a valid part."
        )
    check_targets(valid, [length], scaling.trained_length, "--stage-2-length")
    lengths = sorted({*(options.eval_lengths or ()), length // 2, length})
    options = replace(options, stage_2_length=length, eval_lengths=lengths)
    return replace(options, max_seq_length=length) if options.keep_best else options
