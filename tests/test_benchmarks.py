"""The suite against stock mlx-lm: what it refuses, what it writes, and when a goal is met."""

import json

import pytest

from benchmarks import __main__ as suite
from benchmarks.blocks import AGAIN, OURS, STOCK, Comparison, interleave


def comparison(*ours, goal=0.99):
    """Blocks of one second of stock, and these of ours."""
    stock = [1.0] * len(ours)
    return Comparison("decode", 512, {STOCK: stock, OURS: list(ours), AGAIN: stock}, goal)


def test_a_goal_is_met_by_the_interval_and_the_median():
    """A wide interval alone must not meet it."""
    assert comparison(1.0, 1.0, 1.0).met
    assert comparison(1.02, 1.02, 0.9).met
    assert not comparison(1.2, 1.2, 0.5).met
    assert not comparison(1.02, 1.02, 1.02).met
    assert comparison(2.0, 2.0, 2.0).ratio(OURS) == (0.5, 0.5, 0.5)


def test_blocks_take_turns():
    """The order rotates, and the first round only warms up."""
    order = []
    seconds = interleave(3, order.append)
    assert [order[n] for n in (0, 3, 6, 9)] == [STOCK, OURS, AGAIN, STOCK]
    assert {kind: len(its) for kind, its in seconds.items()} == dict.fromkeys(
        (STOCK, OURS, AGAIN), 3
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["decod"], "there is no case 'decod'. Did you mean decode?"),
        (["--backend", "cuda"], "CUDA is not there"),
        (["--blocks", "1"], "must be at least 2"),
    ],
)
def test_what_cannot_be_run(options, words, capsys, monkeypatch):
    """One line, before anything is measured."""
    monkeypatch.setattr(suite, "this_back_end", lambda: "cpu")
    with pytest.raises(SystemExit) as ended:
        suite.main(options)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_results_name_the_machine_and_what_did_not_run(tmp_path, capsys, monkeypatch):
    """One case that fails must not end the others."""

    def broken(setup):
        raise RuntimeError("no such model")

    cases = {"broken": broken, "decode": lambda setup: iter([comparison(1.0, 1.0)])}
    monkeypatch.setattr(suite, "CASES", cases)
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit) as ended:
        suite.main(["--output", str(path)])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "| broken | not run: no such model |" in said
    assert "| decode | 512 | 1.000 | 1.000 | 1.000 (1.000 to 1.000)" in said
    results = json.loads(path.read_text())
    assert {"machine", "back_end", "mlx", "mlx-lm", "commit"} <= results.keys()
    assert results["not_run"] == {"broken": "no such model"}
    assert results["rows"][0]["met"] is True
