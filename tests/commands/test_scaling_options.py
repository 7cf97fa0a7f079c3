"""The options of the scalings."""

import argparse

import pytest

from mlx_clex.commands.scaling_options import add_scaling_arguments, scaling_from
from mlx_clex.errors import InputError


def test_keys_without_an_effect_are_no_options():
    """`--scaling clex --factor 4` made a model that reaches 16 times its trained length."""
    parser = argparse.ArgumentParser()
    add_scaling_arguments(parser)
    args = parser.parse_args(["--scaling", "clex", "--factor", "4"])
    with pytest.raises(InputError, match=r"clex has no --factor\. It has: --max-factor, "):
        scaling_from(args)
