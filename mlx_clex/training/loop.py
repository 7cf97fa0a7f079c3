"""The training loop: steps, reports, validations, saves, and resuming from a save.

A save holds everything that decides the next step: weights, optimizer, random state of the
draws, place in the data, iteration. A resumed run on the CPU is bit-identical to one that was
never stopped.

Not covered: what is trained, and with which optimizer (`setup.py`).
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from tqdm import tqdm

from ..checkpoint.adapters import ADAPTER_SCALING, ADAPTERS, CURRENT, EXTRA_WEIGHTS
from ..checkpoint.files import read_json
from ..checkpoint.folder import files_of
from ..checkpoint.safetensors_file import read_tensors
from ..data.corpus import Corpus
from ..errors import InputError, RunError, reading
from ..evaluation.perplexity import Protocol, Score, mean_loss, score
from ..model.finite import check_like
from ..scaling import PREFIX
from .batches import Batches
from .best import BEST, Best
from .draws import Draws
from .log import LOG, Log
from .options import TrainingOptions
from .progress import Progress, not_finite
from .progress_bars import Pace, with_bar
from .ranks import Ranks
from .saves import OPTIMIZER, STATE, Checkpoints
from .step import Result, TrainingStep

_WINDOWS = 4  # of each length, in a validation
_BEST_WINDOWS = 16  # the same, where a validation decides which weights are kept


@dataclass
class Run:
    """A training run, from its parts."""

    step: TrainingStep
    draws: Draws
    batches: Batches
    options: TrainingOptions
    checkpoints: Checkpoints
    config: Mapping[str, Any]  # written as adapter_config.json
    callback: TrainingCallback  # is told the figures that are printed
    valid: Batches | None = None
    valid_corpus: Corpus | None = None
    extra: frozenset[str] = frozenset()  # saved names that no adapter loader knows
    kept: frozenset[str] = frozenset()  # names that are saved though they are not trained
    best: Best | None = None  # None: the run ends with its last weights
    ranks: Ranks = field(default_factory=Ranks)
    progress: Progress = field(default_factory=Progress)

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self.step.model

    def resume(self, same: Mapping[str, Any]) -> bool:
        """Restore the newest save, so that the run goes on from it.

        Args:
            same: settings that must be the same as when the save was written.

        Returns:
            Whether there was a save.

        Raises:
            InputError: the save is damaged, or of another run; the message says what differs.
        """
        newest = self.checkpoints.newest
        if newest is None:
            return False
        damaged = (
            f"The save {newest} is damaged. To go on from an older one beside it, point the link "
            f"{self.checkpoints.folder / CURRENT} there. The error was"
        )
        with reading(damaged, always=True):
            files = {file.name: file for file in files_of(newest)}
            state = read_json(newest / STATE)
            before = dict(state["same"])
            saved: dict[str, Any] = {
                name: read_tensors(files[name])[0]
                for name in (ADAPTERS, ADAPTER_SCALING, EXTRA_WEIGHTS, OPTIMIZER, BEST)
                if name in files
            }
        differing = [
            f"{key} was {before.get(key)!r} and is {same.get(key)!r}"
            for key in sorted(before.keys() | same.keys())
            if before.get(key) != _as_json(same.get(key))
        ]
        if differing:
            raise InputError(
                f"{self.checkpoints.folder} holds a run with other settings: "
                f"{'; '.join(differing)}. Resume with the same ones, or give another "
                "--adapter-path."
            )
        with reading(damaged, always=True):
            self.step.restore(saved.pop(OPTIMIZER))
            if self.best is not None:
                self.best.resume(state["best"], saved.pop(BEST), self.model)
            weights = {name: array for part in saved.values() for name, array in part.items()}
            check_like(weights, self._weights())
            self.model.load_weights(list(weights.items()), strict=False)
            self.draws.rng.bit_generator.state = state["rng"]
            self.batches.state = state["data"]
            self.progress = Progress(**state["progress"])
        return True

    def train(self, same: Mapping[str, Any]) -> None:
        """Run to the last iteration, with saves on the way and at the end.

        Args:
            same: settings that a resumed run must have in common with this one.

        Raises:
            InputError: the folder for saves cannot be made.
            RunError: a loss or the weights are not finite, or MLX failed; the last save stays.
            KeyboardInterrupt: Ctrl-C, after a save.
        """
        options, progress = self.options, self.progress
        if self.ranks.first:
            try:
                self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"--adapter-path {self.checkpoints.folder} cannot be made ({error.strerror}): "
                    "give another."
                ) from error
        log = Log(self.checkpoints.folder / LOG if self.ranks.first else None, progress.iteration)
        self.model.train()
        save_due = False
        with self.ranks.running(), log, _stop_request() as stop_asked:
            if progress.iteration == 0:
                self._validate(log)
            with Pace(options.iters, progress.iteration, shown=self.ranks.first) as pace:
                while progress.iteration < options.iters:
                    update = self._iterate(log, pace)
                    iteration = progress.iteration
                    last = iteration == options.iters
                    if last or iteration % options.steps_per_report == 0:
                        self._report(*pace.rates())
                    if last or iteration % options.steps_per_eval == 0:
                        with pace.paused():
                            self._check_weights()
                            self._validate(log)
                    save_due = save_due or iteration % options.save_every == 0
                    if not update:
                        continue  # the gradient of this update is not complete
                    stop = any(self.ranks.each(stop_asked()))
                    if last and self.best is not None:
                        self.best.restore(self.model)
                    if save_due or stop or last:
                        self._save(same)
                        save_due = False
                    if stop:
                        # mlx.launch kills all when one has ended; the first may be saving still.
                        self.ranks.each(0)
                        raise KeyboardInterrupt

    def _iterate(self, log: Log, pace: Pace) -> bool:
        """Run one iteration; return whether it changed the weights."""
        options, progress = self.options, self.progress
        iteration = progress.iteration + 1
        update = iteration % options.grad_accumulation_steps == 0 or iteration == options.iters
        result, scale = self._step(iteration, update)
        if mx.get_cache_memory() > options.clear_cache_threshold:
            mx.clear_cache()
        loss = result.loss / max(result.tokens, 1)
        if what := not_finite({"the loss": loss, "the gradient's norm": result.norm}):
            raise self._failure(f"Iteration {iteration}, scale {scale:g}: {what}")
        progress.iteration = iteration
        progress.losses += result.loss
        progress.tokens += result.tokens
        progress.trained_tokens += result.tokens
        log.write(
            {
                "iteration": iteration,
                "loss": loss,
                "scale": scale,
                "learning_rate": self._learning_rate,
                "tokens": progress.trained_tokens,
            }
        )
        pace.step(result.tokens)
        return update

    def _step(self, iteration: int, update: bool) -> tuple[Result, float]:
        batch = self.batches.next()
        draw = self.draws.draw(batch.tokens.shape[1])
        # A seed for each iteration, so that dropout is the same after a resume.
        ranks = self.ranks
        mx.random.seed((self.options.seed * 1_000_003 + iteration) * ranks.size + ranks.rank)
        return self.step(batch.rows(ranks.rank, ranks.size), draw, update=update), draw.scale

    def _failure(self, what: str) -> RunError:
        newest = self.checkpoints.newest
        kept = f"the last good save is {newest}" if newest else "nothing was saved yet"
        return RunError(
            f"{what}; {kept}. Begin a run with a lower --learning-rate or "
            "--scaling-learning-rate, or with --max-grad-norm; --resume-adapter-file starts it "
            "from the adapters of a save."
        )

    def _check_weights(self) -> None:
        """Refuse to go on with weights that are not finite, or that give no finite loss.

        The loss of an iteration is that of the weights before its update, so it does not show
        what the update did to them.
        """
        weights: Any = tree_flatten(self.model.trainable_parameters())
        finite: Any = mx.stack([mx.isfinite(value).all() for _, value in weights]).tolist()
        broken = [name for (name, _), fine in zip(weights, finite, strict=True) if not fine]
        loss = math.nan if broken else self._loss_of_a_row()
        if any(self.ranks.each(bool(broken) or not math.isfinite(loss))):
            what = f"{broken[0]} is not finite" if broken else f"the loss is {loss:g}"
            raise self._failure(
                f"Iteration {self.progress.iteration}: after its update {what}, so it is not saved"
            )

    def _loss_of_a_row(self) -> float:
        row = next(self.batches.some(1)).rows(0, self.batches.batch_size)
        # Every token counts, since all of a row may be a prompt.
        with np.errstate(all="ignore"):
            return mean_loss(self.model, [row._replace(weights=np.ones_like(row.weights))])

    @property
    def _learning_rate(self) -> float:
        # The first of several optimizers is the scaling's, the last the model's.
        optimizers = getattr(self.step.optimizer, "optimizers", [self.step.optimizer])
        optimizer = optimizers[-1 if self.step.learns_model else 0]
        rate: Any = mx.array(optimizer.learning_rate).item()
        return rate

    def _report(self, iterations_per_second: float, tokens_per_second: float) -> None:
        progress = self.progress
        learning_rate = self._learning_rate
        info = {
            "iteration": progress.iteration,
            "train_loss": progress.losses / max(progress.tokens, 1),
            "learning_rate": learning_rate,
            "iterations_per_second": iterations_per_second,
            "tokens_per_second": tokens_per_second,
            "trained_tokens": progress.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        tqdm.write(
            f"Iter {info['iteration']}: Train loss {info['train_loss']:.3f}, "
            f"Learning Rate {learning_rate:.3e}, "
            f"It/sec {info['iterations_per_second']:.3f}, "
            f"Tokens/sec {info['tokens_per_second']:.3f}, "
            f"Trained Tokens {progress.trained_tokens}, "
            f"Peak mem {info['peak_memory']:.3f} GB"
        )
        self.callback.on_train_loss_report(info)
        progress.losses, progress.tokens = 0.0, 0

    def _validate(self, log: Log) -> None:
        corpus, iteration = self.valid_corpus, self.progress.iteration
        lengths = self.options.eval_lengths or []
        if corpus is None or not (self.valid or lengths):
            return
        started = time.perf_counter()
        mean = None if self.valid is None else self._mean_loss(self.valid)
        found = {n: self._score(corpus, n, max(lengths)) for n in lengths}
        seconds = time.perf_counter() - started
        losses = {f"the loss at {n} tokens": part.loss for n, part in found.items()}
        if mean is not None:
            losses["the validation loss"] = mean
        if what := not_finite(losses):
            raise self._failure(f"Iteration {iteration}: {what}")
        if mean is not None:
            tqdm.write(f"Iter {iteration}: Val loss {mean:.3f}, Val took {seconds:.3f}s")
        if found:
            table = ", ".join(f"{n} tokens {part.perplexity:.3f}" for n, part in found.items())
            scored = next(iter(found.values())).tokens
            tqdm.write(
                f"Iter {iteration}: Perplexity at {table} (the same {scored:,} tokens at each)"
            )
        far = [part.loss for n, part in found.items() if n > self.step.scaling.trained_length]
        if self.best is not None and far and self.best.consider(self.model, float(np.mean(far))):
            tqdm.write(f"Iter {iteration}: The best at long lengths so far.")
        values = {length: part.perplexity for length, part in found.items()}
        log.write({"iteration": iteration, "valid_loss": mean, "perplexity": values})
        by_length = {f"perplexity_{n}": value for n, value in values.items()}
        info = {"iteration": iteration, "val_loss": mean, "val_time": seconds} | by_length
        info = {key: value for key, value in info.items() if value is not None}
        self.callback.on_val_loss_report(info)

    def _mean_loss(self, valid: Batches) -> float:
        shown = self.ranks.first
        batches = with_bar(valid, self.options.val_batches, "Validating", shown=shown)
        return mean_loss(self.model, batches)

    def _score(self, corpus: Corpus, length: int, longest: int) -> Score:
        """Return the losses of the same targets with `length` tokens of context."""
        windows = _WINDOWS if self.best is None else _BEST_WINDOWS
        protocol = Protocol(targets=self.step.scaling.trained_length)
        total = len(protocol.starts(corpus, length, windows, longest)) * (length - 1)
        text = f"Perplexity at {length} tokens"
        shown = self.ranks.first
        with tqdm(total=total, desc=text, unit="token", leave=False, disable=not shown) as bar:
            return score(self.model, corpus, length, windows, protocol, longest, on_read=bar.update)

    def _save(self, same: Mapping[str, Any]) -> None:
        self._check_weights()
        if self.ranks.first:
            self._write_save(same)
        # Wait for the first: a process that ends now would make mlx.launch end it too.
        self.ranks.each(0)

    def _weights(self) -> dict[str, mx.array]:
        """Return the weights that a save has."""
        trained: Any = dict(tree_flatten(self.model.trainable_parameters()))
        if self.kept:
            every: Any = dict(tree_flatten(self.model.parameters()))
            trained |= {name: every[name] for name in self.kept}
        return trained

    def _write_save(self, same: Mapping[str, Any]) -> None:
        trained = self._weights()
        scaling = {k: v for k, v in trained.items() if k.startswith(PREFIX)}
        extra = {k: v for k, v in trained.items() if k in self.extra}
        rest = {k: v for k, v in trained.items() if k not in scaling and k not in extra}
        arrays = {ADAPTERS: rest, OPTIMIZER: self.step.optimizer_arrays()}
        if scaling:
            arrays[ADAPTER_SCALING] = scaling
        if extra:
            arrays[EXTRA_WEIGHTS] = extra
        config = {
            **self.config,
            "trained_scaling": bool(scaling),
            "trained_extra": sorted(extra),
        }
        state = {
            "same": _as_json(same),
            "rng": self.draws.rng.bit_generator.state,
            "data": self.batches.state,
            "progress": vars(self.progress),
        }
        if self.best is not None:
            arrays[BEST] = self.best.weights
            state["best"] = self.best.loss
        saved = self.checkpoints.save(self.progress.iteration, arrays, config, state)
        tqdm.write(f"Iter {self.progress.iteration}: Saved {saved}.")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second one stops at once."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        tqdm.write("Stopping after this step; Ctrl-C again stops without a save.")

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # only the main thread gets signals
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
