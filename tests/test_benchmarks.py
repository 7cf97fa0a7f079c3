"""The suite against stock mlx-lm: what it refuses, what it writes, and when a goal is met."""

import json

import pytest

from benchmarks import __main__ as suite  # isort: skip  (before mlx.core)

import mlx.core as mx

from benchmarks import extrapolation
from benchmarks.blocks import AGAIN, OURS, STOCK, Comparison, NotRun, interleave
from benchmarks.speed import Bench, Setup, rotating_again
from mlx_clex.evaluation.results import Results


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
    assert not comparison(1.04, 1.04, 0.9, goal=0.97).met  # only "at least 0.99" has slack


def test_goals_of_memory_and_of_milliseconds():
    """A fast step that needs too much memory, and a load that takes too long, must not pass."""
    times = {kind: [1.0, 1.0] for kind in (STOCK, OURS, AGAIN)}
    for peak, met in ((80.0, True), (95.0, False)):
        memory = {STOCK: 100.0, OURS: peak}
        found = Comparison("train", 512, times, goal=1.0, memory=memory, memory_goal=0.9)
        assert found.met is met
    for seconds, met in ((1.014, True), (1.016, False)):
        slower = times | {OURS: [seconds, seconds]}
        assert Comparison("load", 3, slower, most_extra=0.015).met is met
    assert Comparison("convert", 600, times).met is None


def test_growth_is_against_the_first_length():
    """How each side grows with the length is a column."""
    short = comparison(1.0, 1.0)
    row = comparison(3.0, 3.0).row(short)
    assert row["growth"] == {OURS: 3.0, STOCK: 1.0}
    assert short.row()["growth"] == {}


def test_the_way_of_the_release_gives_the_same_logits():
    """Otherwise its time would be that of something else."""
    setup = Setup("bundled:base", (40,), trained_length=64)
    usual = Bench(setup, setup.stock, None, 40)
    again = Bench(setup, *rotating_again(setup.another()), 40)
    last = setup.ids[None, 40:41]
    for _ in range(2):
        both = [bench.model(last, cache=bench.cache) for bench in (usual, again)]
        assert mx.abs(both[0] - both[1]).max().item() < 1e-3


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

    found = [comparison(1.0, 1.0), NotRun("train", 8192, "needs 9 GB")]
    cases = {"broken": broken, "decode": lambda setup: iter(found)}
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
    assert results["not_run"] == {"broken": "no such model", "train, 8,192": "needs 9 GB"}
    assert results["rows"][0]["met"] is True


def test_the_extrapolation_tables_are_means_over_seeds(tmp_path, capsys):
    """A method has the mean and the deviation of its seeds, without those not fully measured."""
    stage = extrapolation.USUAL
    runs = [extrapolation.Run("clex, two-stage", seed) for seed in (0, 1, 2)]
    for run, value, correct in zip(runs, (10.0, 12.0, 99.0), (2, 4, 0), strict=True):
        folder = tmp_path / run.name / stage.name
        folder.mkdir(parents=True)
        lengths = list(zip(extrapolation.LENGTHS, (1, 2, 3, 4, 5, 6), strict=True))
        cells = [
            {"label": "m", "length": length, "perplexity": value * factor, "ratio": factor}
            for length, factor in lengths
        ]
        Results("perplexity", {}, ("label", "length"), cells, folder / "perplexity").write()
        found = [
            {"label": "m", "length": length, "depth": depth, "trials": 4, "correct": hits}
            for length, _ in lengths
            for depth, hits in ((0.0, correct), (1.0, 4))
        ]
        keys = ("label", "length", "depth")
        Results("passkey", {}, keys, found, folder / "passkey").write()
        if run.seed < 2:
            (folder / extrapolation.MEASURED).touch()
    missing = extrapolation.Run("none", 0)
    extrapolation.print_tables([*runs, missing], stage, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "two-stage" in line]
    assert lines[0].startswith("| clex, two-stage | 11.00 ± 1.41 | 22.00 ± 2.83 |")
    assert lines[1].startswith("| clex, two-stage | 1.000 ± 0.000 | 2.000 ± 0.000 |")
    assert lines[2].startswith("| clex, two-stage | 0.88 ± 0.18 | 0.88 ± 0.18 |")
    assert len(lines) == 3
    assert (tmp_path / "extrapolation-rows-4x.json").exists()


def test_tables_without_a_finished_run(tmp_path, capsys):
    """It was a traceback."""
    runs = [extrapolation.Run("none", 0)]
    extrapolation.print_tables(runs, extrapolation.USUAL, tmp_path / "none")
    assert "None of these runs is finished in" in capsys.readouterr().out
