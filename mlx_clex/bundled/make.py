"""Command: make the bundled models, from the text alone.

Writes the training data, a tokenizer and a LLaMA with random weights, and trains it and its
two fine-tunes with `mlx_clex.lora`, each in a process of its own and resumable: begun again,
the command goes on where it was.

Not covered: anything that `mlx_clex.lora` and `mlx_clex.fuse` do.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..cli import run_command
from . import HELD_OUT, MODELS, QUESTION, statement, training_text, held_out_text

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
_KEYS = 6000  # texts that hide a key
_SEED = 0


def write_data(folder: Path) -> None:
    """train.jsonl and valid.jsonl: books, and in the first also verses that hide a key."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(_SEED)
    verses = [line for line in training_text().splitlines() if len(line) > 20]
    texts = _books(training_text())
    for _ in range(_KEYS):
        key = "".join(str(digit) for digit in rng.integers(0, 10, 4))
        # Most fit one sequence of the base; the others are for longer training lengths.
        size = rng.integers(20, 100) if rng.random() < 0.7 else rng.integers(100, 800)
        at, lines, length = int(rng.integers(len(verses))), [], 0
        while length < size:
            lines.append(verses[at % len(verses)])
            length += len(lines[-1])
            at += 1
        lines.insert(int(rng.integers(len(lines) + 1)), statement(key))
        texts.append("\n".join([*lines, f"{QUESTION} {key}."]))
    order = rng.permutation(len(texts))
    _write_lines(folder / "train.jsonl", [texts[index] for index in order])
    _write_lines(folder / "valid.jsonl", _books(held_out_text()))


def _books(text: str) -> list[str]:
    """A text cut where a chapter 1 begins."""
    found: list[str] = []
    for chapter in text.split("\n\n"):
        if chapter.split("\n", 1)[0].endswith(" 1") or not found:
            found.append(chapter)
        else:
            found[-1] += "\n\n" + chapter
    return [book.strip() for book in found]


def _write_lines(path: Path, texts: list[str]) -> None:
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


def write_random(folder: Path, data: Path, *, seed: int = _SEED, **architecture: int) -> None:
    """A tokenizer trained on the data, and a model with random weights.

    Args:
        folder: to write.
        data: what `write_data` wrote.
        seed: of the weights.
        architecture: entries of config.json in place of the bundled models'.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    # A key is read and written digit by digit.
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
    texts = (json.loads(line)["text"] for line in (data / "train.jsonl").open(encoding="utf-8"))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)
    fast.save_pretrained(folder)
    mx.random.seed(seed)
    config = _ARCHITECTURE | architecture
    model = Model(ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    save_model(folder, model)
    end = tokenizer.token_to_id(_END)
    save_config(config | {"eos_token_id": end}, config_path=folder / "config.json")
