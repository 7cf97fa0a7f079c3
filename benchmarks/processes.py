"""Compare a training step that several processes share with one that each takes alone.

    mlx.launch -n 2 -- python -m benchmarks.processes [--model MODEL] [--length 512]

Every process has one row of the batch. Steps with and without the sum over processes take turns,
and all start together. The efficiency is the time alone / the time with the sum, median and 95 %
bootstrap interval. Bytes are those of the gradient; a ring sends 2 (n - 1) / n of them from each
process.
"""

import argparse
import time
from typing import Any

from mlx_clex import attach, load  # before mlx.core: on Linux it looks for OpenBLAS

import mlx.core as mx  # isort: skip
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_clex.training.draws import Draws
from mlx_clex.training.step import Batch, TrainingStep, compute_in_depth

from .blocks import AGAIN, OURS, STOCK, Comparison


def main() -> None:
    """Measure, and print one line in the first process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled:base", help="default: bundled:base")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--blocks", type=int, default=9, help="steps of each kind (default: 9)")
    args = parser.parse_args()
    compute_in_depth()
    group = mx.distributed.init()
    model: Any = attach(load(args.model)[0], {"type": "clex"})
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    optimizer = optim.Adam(learning_rate=1e-5)
    alone = TrainingStep(model, optimizer)
    shared = TrainingStep(model, optimizer, group=group)
    draws = Draws(model.scaling, model.scaling.procedure, np.random.default_rng(0))
    tokens = np.random.default_rng(group.rank()).integers(
        0, model.args.vocab_size, (1, args.length + 1)
    )
    ones = np.ones((1, args.length), np.float32)
    batch = Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), ones)
    seconds: dict[str, list[float]] = {STOCK: [], OURS: [], AGAIN: []}
    for number in range(args.blocks + 1):
        draw = draws.draw(args.length)
        for kind, step in {STOCK: alone, OURS: shared, AGAIN: alone}.items():
            mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))
            started = time.perf_counter()
            step(batch, draw)
            if number:
                seconds[kind].append(time.perf_counter() - started)
    flat: Any = tree_flatten(model.trainable_parameters())
    nbytes = sum(4 * array.size for _, array in flat)
    if group.rank() == 0:
        found = Comparison("processes", args.length, seconds)
        row = found.row()
        ratio, noise = found.ratio(OURS), found.ratio(AGAIN)
        print(
            f"{group.size()} processes, {args.model}, {args.length} tokens each: "
            f"{row['stock_seconds']:.3f} s alone, {row['seconds']:.3f} s together, efficiency "
            f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}), alone / alone {noise[0]:.3f} "
            f"({noise[1]:.3f} to {noise[2]:.3f}), gradient {nbytes / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
