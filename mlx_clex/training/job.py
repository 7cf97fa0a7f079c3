"""A prepared run: print its plan, run it, print what it made.

Not covered: how it is prepared (`prepare.py`), and the training loop (`loop.py`).
"""

import math
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from ..data.corpus import Corpus
from ..errors import RunError
from ..evaluation.perplexity import mean_loss
from ..scaling import PREFIX
from ..scaling.procedure import FIXED, SAMPLINGS, SCALE_DRAWS
from .batches import Batches
from .loop import Run
from .options import TrainingOptions
from .progress import not_finite
from .progress_bars import with_bar
from .ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Job:
    """Training, testing, or both, ready to start."""

    options: TrainingOptions  # with the length that is used
    model: Any
    ranks: Ranks
    entry: dict[str, Any] | None = None  # rope_scaling of a scaling that was switched on
    training: Run | None = None
    corpus: Corpus | None = None  # what is trained on
    going_on: bool = False  # False: there is no iteration left to train
    same: dict[str, Any] | None = None  # what a resumed run must have in common with this one
    test: Batches | None = None

    def run(self) -> None:
        """Train, then test.

        Raises:
            InputError: the processes do not have the same options, model, data and saves.
            RunError: a loss is not finite, or MLX failed.
        """
        training, ranks = self.training, self.ranks
        if training is not None:
            settings = [asdict(self.options), self.entry, self.same, training.progress.iteration]
            with ranks.starting():
                ranks.check_same(settings)
            if self.going_on:
                print(self.plan(), flush=True)
                training.train(self.same or {})
        if self.test is not None and ranks.first:
            batches = with_bar(self.test, self.options.test_batches, "Testing")
            with ranks.running():
                loss = mean_loss(self.model, batches)
            if what := not_finite({"the test loss": loss}):
                raise RunError(
                    f"{what.capitalize()}. The model or its adapters are damaged, or the texts "
                    "have no tokens to predict: use an earlier save, or other texts."
                )
            print(f"Test loss {loss:.3f}, Test ppl {math.exp(min(loss, 700)):.3f}.")

    def plan(self) -> str:
        """What the training will do, a line for each thing that decides its result."""
        options, training, scaling = self.options, self.training, self.model.scaling
        assert training is not None
        assert self.corpus is not None
        draws, batches = training.draws, training.batches
        procedure, length = draws.procedure, batches.length
        reach = "no limit" if scaling.reach is None else f"{scaling.reach:,} tokens"
        share = procedure.plain_share_at(length, scaling.trained_length)
        plain = f"{share:.0%} of the steps, in rows of at most {scaling.trained_length:,} tokens"
        held_out = training.valid_corpus
        measured = "" if training.valid or options.eval_lengths else "; not measured"
        first = training.progress.iteration + 1
        most = "" if procedure.scale_draw == FIXED else f", at most {scaling.largest_scale:g}"
        upto = "" if options.packing == "concat" else "at most "
        every = options.grad_accumulation_steps
        tokens = options.batch_size * length
        iterations = options.iters - first + 1
        lines = {
            "model": f"{options.model}: {scaling.name}, trained length "
            f"{scaling.trained_length:,} tokens, reach {reach}",
            "trained": self._trained(),
            "scale": f"{procedure.scale_draw}{most}: {SCALE_DRAWS[procedure.scale_draw]}",
            "positions": f"{procedure.sampling}: {SAMPLINGS[procedure.sampling]}",
            "plain steps": plain if share else "none",
            "data": _sized(self.corpus),
            "held out": f"{_sized(held_out)}{measured}" if held_out else "nothing",
            "steps": f"iterations {first:,} to {options.iters:,}, an update every "
            f"{'iteration' if every == 1 else f'{every:,} iterations'}",
            "tokens": f"{upto}{tokens:,} an iteration ({options.batch_size} x {length:,}), "
            f"{upto}{iterations * tokens:,} in all, {iterations / batches.per_epoch:.2g} times "
            "the data",
            "saves": f"every {options.save_every:,} iterations into {options.adapter_path}",
        }
        return "\n".join(f"{name + ':':<12} {text}" for name, text in lines.items())

    def made(self) -> str:
        """What the training made, where, and the commands that use it."""
        model, folder = shlex.quote(str(self.options.model)), self.options.adapter_path
        paths = f"--model {model} --adapter-path {shlex.quote(folder)}"
        return (
            f"Trained {self.options.iters:,} iterations; the result is in {folder}.\n"
            f"Try them:   mlx_clex generate {paths} --prompt 'Once upon a time'\n"
            f"Merge them: mlx_clex fuse {paths} --save-path fused_model"
        )

    def _trained(self) -> str:
        """What is trained, and how many parameters that is."""
        options, training = self.options, self.training
        assert training is not None
        parameters: Any = dict(tree_flatten(self.model.trainable_parameters()))
        layers = len(self.model.layers)
        last = layers if options.num_layers == -1 else min(options.num_layers, layers)
        parts = []
        if options.fine_tune_type != "scaling":
            kind = "weights" if options.fine_tune_type == "full" else options.fine_tune_type
            which = f"all {layers}" if last == layers else f"the last {last} of {layers}"
            parts.append(f"{kind} of {which} layers")
        if any(name.startswith(PREFIX) for name in parameters):
            parts.append("the scaling")
        if training.extra:
            parts.append("norms and embeddings")
        count, total = sum(p.size for p in parameters.values()), get_total_parameters(self.model)
        return f"{' and '.join(parts)}: {count:,} of {total:,} parameters ({count / total:.2%})"


def _sized(corpus: Corpus) -> str:
    return f"{corpus.name}, {len(corpus.tokens):,} tokens"
