"""The loss of a training run."""

import math

import numpy as np
import pytest

from mlx_clex.errors import InputError
from mlx_clex.pictures.training import draw_training

from .rows import log


@pytest.mark.parametrize(("iterations", "window"), [(19, 1), (60, 3), (300, 15)])
def test_a_training_run(tmp_path, figures, named, iterations, window):
    """Every loss, their running mean where there are many, and validation by length."""
    lines = [*log(iterations), {"iteration": 0, "valid_loss": 4.5, "perplexity": {"128": 90.0}}]
    draw_training(sorted(lines, key=lambda line: line["iteration"]), tmp_path / "a.png", "A run")
    losses, by_length = figures[0].axes
    assert figures[0].get_suptitle() == "A run"
    all_losses = [[row["iteration"], row["loss"]] for row in lines if "loss" in row]
    assert losses.lines[0].get_xydata().tolist() == all_losses
    *_, mean, valid = losses.lines
    assert mean.get_xydata()[0].tolist() == pytest.approx(
        [(window + 1) // 2, np.mean([loss for _, loss in all_losses[:window]])]
    )
    validated = range(20, iterations + 1, 20)
    assert valid.get_xydata().tolist() == [[n, 4.5] for n in (0, *validated)]
    shown = named(by_length)
    assert shown.pop("128 tokens") == [[n, 90.0 + n] for n in (0, *validated)]
    assert shown == ({"4,096 tokens": [[n, 95.0 + n] for n in validated]} if validated else {})


def test_a_run_without_validation(tmp_path, figures):
    """One panel."""
    draw_training(
        [{"iteration": 1, "loss": 3.0}, {"iteration": 2, "loss": math.nan}], tmp_path / "a.png"
    )
    (axes,) = figures[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 3]]


def test_a_log_without_losses(tmp_path):
    """A run that has just begun."""
    with pytest.raises(InputError, match="no losses"):
        draw_training([], tmp_path / "a.png")
