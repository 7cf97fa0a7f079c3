"""Command: fine-tune a model for texts longer than it was trained on.

Takes the options and YAML files of `mlx_lm.lora`; adapters are in mlx-lm's own format.
Added are the scaling and how its scales and positions are drawn, packing, clipping,
warm-up and cosine, perplexity by length, and going on after an interruption.

Not covered: a model that one process cannot hold.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .checkpoint.files import expand
from .checkpoint.lock import locked
from .commands.memory_check import MemoryCheck, add_force
from .commands.run_command import check_seed, command
from .commands.scaling_options import add_scaling_arguments, scaling_from
from .diagnosis.memory import Training
from .model.sharding import one_voice
from .training.option_fields import add_options, with_config
from .training.options import DEFAULT_LENGTH, TrainingOptions
from .training.prepare import prepare
from .training.ranks import Ranks
from .training.recipe import stages
from .training.setup import OPTIMIZER_STATES
from .training.step import compute_in_depth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: those of mlx_lm.lora under the same names, and ours."""
    add_options(parser, TrainingOptions)
    add_scaling_arguments(parser)
    add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Train, test, or both.

    Raises:
        InputError: options, data or a folder that cannot be used.
        RunError: the loss is no longer a number, or MLX failed.
    """
    compute_in_depth()
    group = mx.distributed.init()
    ranks = Ranks(group)
    with one_voice(group):
        with ranks.starting():
            args = with_config(args, TrainingOptions)
            check_seed(args.seed)
            options = TrainingOptions.of(args)
        # One process for all: the others of a distributed run would wait for it.
        folder = expand(options.adapter_path)
        writes = options.train and ranks.first and folder.name
        with locked(folder, f"--adapter-path {folder}") if writes else nullcontext():
            first, *later = stages(options, ranks.size)
            check = MemoryCheck(force=args.force)
            at_load = partial(_before_reading, check, ranks.size)
            with ranks.starting():
                job = prepare(first, scaling_from(args), ranks, at_load(first))
                if later and ranks.first:
                    _check_rows_of_stage_2(check, job.options)
            test = job.test
            (replace(job, test=None) if later else job).run()
            for stage in later:
                with ranks.starting():
                    job = prepare(stage, scaling_from(args), ranks, at_load(stage))
                    job = replace(job, test=test)
                job.run()
        if job.training:
            print(job.made())


def _before_reading(
    check: MemoryCheck, processes: int, options: TrainingOptions
) -> Callable[[nn.Module], None] | None:
    """Return what warns of, or refuses, training that does not fit this machine."""
    if not options.train:
        return None
    rank = options.lora_parameters.get("rank", 8)
    run = Training(
        length=options.max_seq_length or DEFAULT_LENGTH,
        batch=max(1, options.batch_size // processes),
        rank=rank if isinstance(rank, int) else 8,
        grad_checkpoint=options.grad_checkpoint,
        full=options.fine_tune_type == "full",
        states=OPTIMIZER_STATES[options.optimizer],
        num_layers=options.num_layers,
        learns=bool(options.scaling_learning_rate)
        or options.release_recipe
        or options.fine_tune_type == "scaling",
    )
    what = f"Training on {run.batch} x {run.length:,} tokens"
    return check.at_load(partial(check, run, what))


def _check_rows_of_stage_2(check: MemoryCheck, options: TrainingOptions) -> None:
    """Say what the rows of stage 2 need; warn of, or refuse, those that do not fit."""
    assert options.stage_2_length is not None
    run = Training(
        length=options.stage_2_length,
        grad_checkpoint=options.grad_checkpoint,
        states=OPTIMIZER_STATES[options.optimizer],
        learns=True,
    )
    what = f"Stage 2 on 1 x {run.length:,} tokens (--stage-2-length)"
    check(run, what, state=True)


main = command(
    "lora",
    add_arguments,
    run,
    "--train --model bundled:base --scaling clex --data texts --iters 200 "
    "--eval-lengths 64 256 1024",
)


if __name__ == "__main__":
    sys.exit(main())
