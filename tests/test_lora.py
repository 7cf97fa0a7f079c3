"""The fine-tuning command, and the recipes in examples/."""

from pathlib import Path

import numpy as np
import pytest

from mlx_clex.commands.scaling_options import scaling_from
from mlx_clex.scaling import build_scaling
from mlx_clex.training.draws import Draws
from mlx_clex.training.options import TrainingOptions

from .training.commands import call, parse

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_nothing_given_is_one_line(capsys):
    """What to give is said."""
    for argv, match in [
        ([], "give --train, --test or both"),
        (["--train"], "No model"),
        (["--train", "--model", "m"], "No data"),
        (["--train", "--model", "m", "--data", "d", "--batch-size", "0"], "--batch-size must be"),
    ]:
        assert call(argv) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert match in error


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_read(file):
    """Every key is known, and the scaling can be trained at its length."""
    args = parse("-c", str(file))
    options = TrainingOptions.of(args)
    shape = {"dims": 128, "base": 1e4, "trained_length": 4096}
    scaling = build_scaling(scaling_from(args), **shape)
    draws = Draws(scaling, scaling.procedure, np.random.default_rng(0))
    draws.check(options.max_seq_length)
    assert draws.draw(options.max_seq_length).positions.max() < scaling.largest_scale * 4096
    for line in file.read_text().splitlines():
        assert "#" in line, f"{line} has no comment"
