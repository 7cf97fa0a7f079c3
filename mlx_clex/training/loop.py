"""The training loop: steps, reports, evaluations, saves, and going on from one.

What decides the next step is saved in full: weights, optimizer, generator of the draws,
place in the data, iteration. A resumed run on the CPU is bit-identical to one that was
never stopped.

Not covered: what is trained and with which optimizer (`setup.py`).
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
from mlx.utils import tree_flatten
from tqdm import tqdm

from ..checkpoint.adapters import ADAPTER_SCALING, EXTRA_WEIGHTS
from ..data.corpus import Corpus
from ..errors import InputError, RunError
from ..evaluation.perplexity import mean_loss, perplexity
from ..scaling import PREFIX
from .batches import Batches
from .draws import Draws
from .log import LOG, Log
from .ranks import Ranks
from .saves import ADAPTERS, CURRENT, OPTIMIZER, STATE, Checkpoints, read_json
from .step import Result, TrainingStep


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """When to do what, in iterations; one iteration is one micro-batch."""

    iters: int
    grad_accumulation_steps: int = 1
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    val_batches: int = 25  # -1: all
    clear_cache_threshold: int = 0  # bytes of freed memory that MLX may keep
    eval_lengths: tuple[int, ...] = ()  # tokens
    eval_windows: int = 4  # sequences at each of these lengths


@dataclass
class Progress:
    """What is counted on the way."""

    iteration: int = 0
    trained_tokens: int = 0
    # Since the last report:
    losses: float = 0.0
    tokens: int = 0


@dataclass
class Run:
    """A training run, from its parts."""

    step: TrainingStep
    draws: Draws
    batches: Batches
    options: LoopOptions
    checkpoints: Checkpoints
    config: Mapping[str, Any]  # written as adapter_config.json
    valid: Batches | None = None
    valid_corpus: Corpus | None = None
    extra: frozenset[str] = frozenset()  # trained names that no adapter loader knows
    seed: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    on_report: Callable[[dict[str, Any]], None] = lambda info: None
    on_validation: Callable[[dict[str, Any]], None] = lambda info: None
    progress: Progress = field(default_factory=Progress)

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self.step.model

    def resume(self, same: Mapping[str, Any]) -> bool:
        """Go on from the newest save.

        Args:
            same: settings that must be as they were.

        Returns:
            Whether there was one.

        Raises:
            InputError: it is of another run; the message says what differs.
        """
        newest = self.checkpoints.newest
        if newest is None:
            return False
        try:
            state = read_json(newest / STATE)
            before = state["same"]
            saved: dict[str, Any] = {
                name: mx.load(str(newest / name))
                for name in (ADAPTERS, ADAPTER_SCALING, EXTRA_WEIGHTS, OPTIMIZER)
                if (newest / name).is_file()
            }
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"The save {newest} is damaged ({error}). To go on from an older one beside it, "
                f"point the link {self.checkpoints.folder / CURRENT} there."
            ) from error
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
        self.step.restore(saved.pop(OPTIMIZER))
        for weights in saved.values():
            self.model.load_weights(list(weights.items()), strict=False)
        self.draws.rng.bit_generator.state = state["rng"]
        self.batches.state = state["data"]
        self.progress = Progress(**state["progress"])
        return True

    def train(self, same: Mapping[str, Any]) -> None:
        """Run to the last iteration, saving as it goes and at the end.

        Args:
            same: settings that a later resume must have as well.

        Raises:
            InputError: the folder for saves cannot be made.
            RunError: the loss is no longer a number, or MLX failed; the last save stays.
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
        started, timed_steps, timed_tokens = time.perf_counter(), 0, 0
        save_due = False
        bar = tqdm(
            total=options.iters,
            initial=progress.iteration,
            desc="Training",
            leave=False,
            disable=not self.ranks.first,
        )
        with self.ranks.running(), log, bar, _stop_request() as stop_asked:
            if progress.iteration == 0:
                self._validate(log)
                started = time.perf_counter()
            while progress.iteration < options.iters:
                iteration = progress.iteration + 1
                update = (
                    iteration % options.grad_accumulation_steps == 0 or iteration == options.iters
                )
                result, scale = self._iterate(iteration, update)
                if mx.get_cache_memory() > options.clear_cache_threshold:
                    mx.clear_cache()
                loss = result.loss / max(result.tokens, 1)
                self._check_finite(iteration, scale, loss, result.norm)
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
                timed_steps += 1
                timed_tokens += result.tokens
                bar.update()
                if iteration % options.steps_per_report == 0 or iteration == options.iters:
                    seconds = time.perf_counter() - started
                    self._report(timed_steps / seconds, timed_tokens / seconds)
                    started, timed_steps, timed_tokens = time.perf_counter(), 0, 0
                if iteration % options.steps_per_eval == 0 or iteration == options.iters:
                    before = time.perf_counter()
                    self._validate(log)
                    started += time.perf_counter() - before
                save_due = save_due or iteration % options.save_every == 0
                if not update:
                    continue  # there is a half-made gradient
                stop = any(self.ranks.each(stop_asked()))
                if save_due or stop or iteration == options.iters:
                    self._save(same)
                    save_due = False
                if stop:
                    raise KeyboardInterrupt

    def _iterate(self, iteration: int, update: bool) -> tuple[Result, float]:
        batch = self.batches.next()
        draw = self.draws.draw(batch.tokens.shape[1])
        # Dropout of an iteration depends on nothing that came before it.
        ranks = self.ranks
        mx.random.seed((self.seed * 1_000_003 + iteration) * ranks.size + ranks.rank)
        return self.step(batch.rows(ranks.rank, ranks.size), draw, update=update), draw.scale

    def _check_finite(self, iteration: int, scale: float, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        newest = self.checkpoints.newest
        kept = f"the last good save is {newest}" if newest else "nothing was saved yet"
        raise RunError(
            f"Iteration {iteration}, scale {scale:g}: the loss is {loss:g}, the gradient's norm "
            f"{norm:g}; {kept}. Begin a run with a lower --learning-rate or "
            "--scaling-learning-rate, or with --max-grad-norm; --resume-adapter-file starts it "
            "from the adapters of a save."
        )

    @property
    def _learning_rate(self) -> float:
        # Of several optimizers the last is the model's.
        optimizer = getattr(self.step.optimizer, "optimizers", [self.step.optimizer])[-1]
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
        self.on_report(info)
        progress.losses, progress.tokens = 0.0, 0

    def _validate(self, log: Log) -> None:
        options, info = self.options, {"iteration": self.progress.iteration}
        if self.valid is None or self.valid_corpus is None:
            return
        started = time.perf_counter()
        loss = mean_loss(self.model, self.valid.some(options.val_batches))
        found = {
            n: perplexity(self.model, self.valid_corpus, n, options.eval_windows)
            for n in options.eval_lengths
        }
        seconds = time.perf_counter() - started
        text = f"Iter {self.progress.iteration}: Val loss {loss:.3f}, Val took {seconds:.3f}s"
        tqdm.write(text)
        if found:
            table = ", ".join(f"{n} tokens {value:.3f}" for n, value in found.items())
            tqdm.write(f"Iter {self.progress.iteration}: Perplexity at {table}")
        log.write(info | {"valid_loss": loss if math.isfinite(loss) else None, "perplexity": found})
        by_length = {f"perplexity_{n}": value for n, value in found.items()}
        self.on_validation(info | {"val_loss": loss, "val_time": seconds} | by_length)

    def _save(self, same: Mapping[str, Any]) -> None:
        if self.ranks.first:
            self._write_save(same)
        self.ranks.each(0)  # nobody ends, and so ends the others, before it is written

    def _write_save(self, same: Mapping[str, Any]) -> None:
        trained = dict(tree_flatten(self.model.trainable_parameters()))
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
            "trained_extra": bool(extra),
        }
        state = {
            "same": _as_json(same),
            "rng": self.draws.rng.bit_generator.state,
            "data": self.batches.state,
            "progress": vars(self.progress),
        }
        saved = self.checkpoints.save(self.progress.iteration, arrays, config, state)
        tqdm.write(f"Iter {self.progress.iteration}: Saved {saved}.")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C be asked for, and the second stop at once."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        tqdm.write("Stopping after this step; Ctrl-C again stops without a save.")

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread, where no signal comes
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
