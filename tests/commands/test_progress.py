"""The bar of reading is there before the first pass, and its rate is a true one."""

import time

import pytest

from mlx_clex.commands.progress import reading_bar


def test_the_bar_stands_at_once_and_ends_its_line(capsys):
    """It appeared after the first pass, with the rate of no time at all."""
    with reading_bar(1000) as move:
        assert "0/1000" in capsys.readouterr().err
        move(0, 1000)
        time.sleep(0.2)
        move(500, 1000)
        half = capsys.readouterr().err
        assert "500/1000" in half
        rate = float(half.rpartition(", ")[2].partition("tok/s")[0])
        assert 500 < rate <= 2500  # 500 tokens in 0.2 s or more
        move(1000, 1000)
        assert capsys.readouterr().err.endswith("\n")
    assert capsys.readouterr().err == ""


def test_a_bar_that_is_not_wanted(capsys):
    """`generate --verbose F` prints nothing but the text."""
    with reading_bar(10, enabled=False) as move:
        move(0, 10)
        move(10, 10)
    assert capsys.readouterr() == ("", "")


def test_the_bar_ends_with_an_error(capsys):
    """The error began on the bar's line."""

    def fail():
        with reading_bar(10) as move:
            move(4, 10)
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    assert capsys.readouterr().err.endswith("\n")
