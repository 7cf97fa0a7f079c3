"""Rows of results, a training log and scalings to draw."""

from functools import partial

from mlx_clex.evaluation.results import Results
from mlx_clex.pictures.draw import draw
from mlx_clex.pictures.frequencies import draw_frequencies
from mlx_clex.pictures.training import draw_training
from mlx_clex.scaling import build_scaling

LENGTHS = (128, 256, 512, 1024, 2048)
DEPTHS = (0.0, 0.5, 1.0)
REACHES = {"base": 128, "base + ntk 4": 512, "clex": 2048, "a $name$ of_theirs": None}


def perplexities():
    return [
        {
            "text": "A $text$",
            "label": label,
            "trained_length": 128,
            "reach": reach,
            "length": length,
            "scale": length / 128,
            "windows": 8,
            "tokens": 8 * length,
            "perplexity": 5.0 + (length - 128) / (reach or 4096),
            "low": 4.5,
            "high": 5.5 + length / 64,
        }
        for label, reach in REACHES.items()
        for length in LENGTHS
    ]


def answers(tasks=("passkey",)):
    return [
        {
            "task": task,
            "label": label,
            "length": length,
            "depth": depth,
            "trials": 10,
            "correct": 10 * (length <= reach),
            "accuracy": float(length <= reach),
            "trained_length": 128,
        }
        for task in tasks
        for label, reach in (("base", 128), ("clex", 2048))
        for length in LENGTHS
        for depth in DEPTHS
    ]


def differences():
    return [
        {
            "first": first,
            "last": last,
            "tokens": last - first + 1,
            "kl": 0.1 * number,
            "flips": 0.025 * (number - 1),
            "perplexity_a": 4.0 + number,
            "perplexity_b": 5.0 + number,
            "model_a": "models/one",
            "model_b": "models/two",
            "label_a": "one",
            "label_b": "two $x$",
            "text": "A text",
        }
        for number, (first, last) in enumerate(((1, 15), (16, 31), (32, 63)), 1)
    ]


def log(iterations=60):
    for iteration in range(1, iterations + 1):
        yield {"iteration": iteration, "loss": 5 - iteration / iterations, "scale": 2.0}
        if iteration % 20 == 0:
            by_length = {"128": 90.0 + iteration, "4096": 95.0 + iteration}
            yield {"iteration": iteration, "valid_loss": 4.5, "perplexity": by_length}


def scaling(name, **entry):
    shape = {"dims": 16, "base": 10_000.0, "trained_length": 32, "heads": 2, "layers": 2}
    made = build_scaling({"type": name, **entry}, **shape)
    for index, tensor in enumerate(made.learned):
        made[tensor] = made[tensor] + 0.02 * (index + 1)
    return made


ROWS = {"perplexity": perplexities, "passkey": answers, "compare": differences}


def results(kind, rows=None):
    return Results(kind, {}, (), ROWS[kind]() if rows is None else rows)


def many():
    """Nine models with long names that all end at one place."""
    return [
        {**row, "label": f"Some-Organisation-Model-{n}-7B-Instruct-v0.{n} + ntk 16"}
        for n in range(9)
        for row in perplexities()
        if row["label"] == "base"
    ]


# Every picture, as a function of the path.
DRAWN = {
    **{kind: partial(lambda kind, path: draw(results(kind), path), kind) for kind in ROWS},
    "many models": lambda path: draw(results("perplexity", many()), path),
    "tasks": lambda path: draw(Results("passkey", {}, (), answers(("words", "kv", "n"))), path),
    "training": lambda path: draw_training(list(log()), path),
    "frequencies": lambda path: draw_frequencies(
        {"mine": scaling("clex"), "another": scaling("gene")}, path
    ),
}
