"""Command: make the bundled models from their training text.

The command writes the training data, a tokenizer and a LLaMA with random weights. It then
trains the base and its two fine-tunes with `mlx_clex.lora`, each in its own process. An
interrupted run continues when the command is run again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_clex.bundled import held_out_text, statement, training_text
from mlx_clex.commands.run_command import run_command
from mlx_clex.errors import RunError

TRAINED_LENGTH = 64
_END = "<|end|>"
_VOCABULARY = 1024
_ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 320,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": TRAINED_LENGTH,
    "tie_word_embeddings": True,
}
_KEYS = 8000  # texts that state a key several times
_SEED = 0
# Options of `mlx_clex.lora` for all runs; those of single runs follow.
TRAINING = {
    "train": True,
    "fine_tune_type": "full",
    "train_norms_and_embeddings": True,
    "num_layers": -1,
    "max_seq_length": TRAINED_LENGTH,
    "batch_size": 32,
    "optimizer": "adamw",
    "optimizer_config": {"adamw": {"weight_decay": 0.1, "betas": [0.9, 0.99]}},
    "warmup": 100,
    "cosine": True,
    "max_grad_norm": 1.0,
    "steps_per_report": 100,
    "steps_per_eval": 500,
    "save_every": 500,
    "val_batches": 8,
    "seed": _SEED,
}
BASE = TRAINING | {"scaling": "none", "iters": 2800, "learning_rate": 4e-3}
# Trained after the base and before the fine-tunes: recall of a one-digit key over a few words.
# A model of this size does not learn recall from full sequences within thousands of steps.
LESSONS = BASE | {
    **{"iters": 400, "learning_rate": 3e-3, "cosine": False},
    **{"packing": "plain", "max_seq_length": 32, "batch_size": 128},
}
# Training at four times the trained length extrapolates further than at the trained length.
_TUNING = TRAINING | {
    **{"iters": 1000, "learning_rate": 2e-3},
    **{"max_seq_length": 4 * TRAINED_LENGTH, "batch_size": 8},
}
# After that. Longer sequences make the end of the reach better (docs/benchmarks.md).
_LONGER = {
    **{"iters": 250, "learning_rate": 5e-4, "warmup": 12},
    **{"max_seq_length": 8 * TRAINED_LENGTH, "batch_size": 4},
}
_FINE_TUNES: dict[str, dict[str, Any]] = {
    "clex": _TUNING | {"scaling": "clex", "max_factor": 32, "log_gain": True},
    "gene": _TUNING | {"scaling": "gene", "factor": 32},
}


def write_books(folder: Path) -> None:
    """Write train.jsonl and valid.jsonl: the books of the bundled text, without keys."""
    _write_lines(folder / "train.jsonl", _books(training_text()))
    _write_lines(folder / "valid.jsonl", _books(held_out_text()))


def write_data(folder: Path, *, digits: int = 4, most_verses: int = 16) -> None:
    """Write train.jsonl (books, and verses with a key stated between them) and valid.jsonl (books).

    Args:
        folder: the folder to write.
        digits: digits of a key.
        most_verses: verses of a text with a key are fewer than this.
    """
    rng = np.random.default_rng(_SEED)
    verses = [line for line in training_text().splitlines() if len(line) > 20]
    texts = _books(training_text())
    for _ in range(_KEYS):
        # Three quarters are short enough for the base; the rest suits longer training lengths.
        count = rng.integers(1, 4) if rng.random() < 0.75 else rng.integers(4, most_verses)
        at = int(rng.integers(len(verses) - count))
        line = statement("".join(str(digit) for digit in rng.integers(0, 10, digits)))
        lines = [line]
        for verse in verses[at : at + count]:
            lines += [verse, line] if rng.random() < 0.5 else [verse]
        texts.append("\n".join(lines if lines[-1] == line else [*lines, line]))
    order = rng.permutation(len(texts))
    _write_lines(folder / "train.jsonl", [texts[index] for index in order])
    _write_lines(folder / "valid.jsonl", _books(held_out_text()))


def write_lessons(folder: Path) -> None:
    """Write train.jsonl: a one-digit key stated twice, with up to four words between."""
    rng = np.random.default_rng(_SEED)
    words = [
        word for line in training_text().splitlines() if len(line) > 20 for word in line.split()
    ]
    texts = []
    for _ in range(5 * _KEYS):
        line = statement(str(rng.integers(0, 10)))
        count, at = int(rng.integers(0, 5)), int(rng.integers(len(words) - 20))
        between = [" ".join(words[at : at + count])] if count else []
        texts.append("\n".join([line, *between, line]))
    _write_lines(folder / "train.jsonl", texts)


def _books(text: str) -> list[str]:
    """Split a text into books, at the headings of first chapters."""
    found: list[str] = []
    for chapter in text.split("\n\n"):
        if chapter.split("\n", 1)[0].endswith(" 1") or not found:
            found.append(chapter)
        else:
            found[-1] += "\n\n" + chapter
    return [book.strip() for book in found]


def _write_lines(path: Path, texts: list[str]) -> None:
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".incomplete")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def write_random(folder: Path, data: Path, *, seed: int = _SEED, **architecture: float) -> None:
    """Write a tokenizer trained on the data and a model with random weights.

    Args:
        folder: the folder to write.
        data: the folder that `write_data` wrote.
        seed: seed of the weights.
        architecture: entries of config.json that replace those of the bundled models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    # Each digit is a token, so that a model can copy a key digit by digit.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)
    fast.save_pretrained(folder)
    mx.random.seed(seed)
    config = _ARCHITECTURE | architecture
    model = Model(ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    save_model(folder, model)
    end = tokenizer.token_to_id(_END)
    save_config(config | {"eos_token_id": end}, config_path=folder / "config.json")


def train(model: Path, data: Path, adapters: Path, settings: dict[str, Any]) -> None:
    """Train a model with `mlx_clex.lora`; resume a run that was interrupted.

    Args:
        model: the folder of the model to start from.
        data: a folder with train.jsonl.
        adapters: the folder of the run.
        settings: options of `lora`.
    """
    recipe = adapters.with_name(f"{adapters.name}.yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    paths = ("--model", model, "--data", data, "--adapter-path", adapters)
    command("lora", "-c", recipe, *paths, "--resume")


def train_and_fuse(model: Path, data: Path, fused: Path, settings: dict[str, Any]) -> Path:
    """Train all weights of a model, write it to `fused` unless it exists, and return that."""
    adapters = fused.with_name(f"{fused.name}-run")
    if not fused.exists():
        train(model, data, adapters, settings)
        command("fuse", "--model", model, "--adapter-path", adapters, "--save-path", fused)
    return fused


def command(name: str, *arguments: Any) -> None:
    """Run a command of mlx_clex in its own process and show its output.

    Raises:
        RunError: the command failed.
    """
    line = [sys.executable, "-m", f"mlx_clex.{name}", *map(str, arguments)]
    if subprocess.run(line).returncode:
        raise RunError(f"This command failed: {shlex.join(line)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("work", type=Path, help="Folder for data, runs and results.")


def run(args: argparse.Namespace) -> None:
    """Make the models that are missing, and write float16 copies to WORK/bundled."""
    work = args.work
    start, books, lessons = (work / name for name in ("start", "books", "lessons"))
    keys, longer_keys = work / "keys", work / "longer-keys"
    if not (start / "config.json").exists():  # the file that is written last
        write_data(books)
        write_data(keys, digits=1)
        write_data(longer_keys, digits=1, most_verses=48)
        write_lessons(lessons)
        write_random(start, books)
    made = {"base": train_and_fuse(start, books, work / "base", BASE)}
    taught = train_and_fuse(made["base"], lessons, work / "taught", LESSONS)
    for name, settings in _FINE_TUNES.items():
        made[name] = work / name
        if not made[name].exists():
            first = work / f"{name}-first"
            train(taught, keys, first, settings)
            longer = settings | _LONGER | {"resume_adapter_file": str(first)}
            train_and_fuse(taught, longer_keys, made[name], longer)
    for name, model in made.items():
        target = work / "bundled" / name
        if not target.exists():
            command("convert", "--hf-path", model, "--mlx-path", target, "--dtype", "float16")
    print(f"Done: {work / 'bundled'}.")


def main() -> None:
    """Run the command and exit with its status."""
    sys.exit(
        run_command(
            add_arguments,
            run,
            prog="bundled_models",
            description="Make the bundled models from their training text.",
        )
    )


if __name__ == "__main__":
    main()
