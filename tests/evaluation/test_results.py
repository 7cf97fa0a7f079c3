"""Result files hold every row, and no run loses or mixes results."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest

from mlx_clex import compare, evaluate, passkey, perplexity
from mlx_clex.checkpoint import lock
from mlx_clex.errors import InputError, RunError
from mlx_clex.evaluation.intervals import exp
from mlx_clex.evaluation.results import open_results, read_results

from ..checkpoint.test_lock import holder

KEYS = ("label", "length")
SETTINGS = {"protocol": "whole", "chunks": (1, 2)}


def opened(prefix, **changes):
    return open_results(
        prefix, **{"kind": "perplexity", "settings": SETTINGS, "keys": KEYS} | changes
    )


def row(label, length, value):
    return {"label": label, "length": length, "perplexity": value}


def test_each_row_is_written_to_both_files_at_once(tmp_path):
    """A run that is killed after its first row must leave that row, as JSON and as CSV."""
    prefix = tmp_path / "new" / "factor-0.5"
    results = opened(prefix)
    for n, length in enumerate((128, 256), 1):
        results.add(row("base", length, 5.25))
        whole = json.loads((tmp_path / "new" / "factor-0.5.json").read_text())
        assert len(whole["rows"]) == n
        with (tmp_path / "new" / "factor-0.5.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == n
    assert whole["kind"] == "perplexity"
    assert whole["settings"] == {"protocol": "whole", "chunks": [1, 2]}
    assert whole["versions"].keys() == {"mlx-clex", "mlx", "mlx-lm"}
    assert whole["rows"][1] == row("base", 256, 5.25)
    assert len(list(prefix.parent.iterdir())) == 2, "a temporary file stayed"


def test_a_table_of_the_user_is_not_replaced(tmp_path):
    """`--output book` replaced book.csv, whatever was in it."""
    table = tmp_path / "book.csv"
    table.write_text("title,pages\nMoby Dick,635\n")
    with pytest.raises(InputError, match=r"book.csv is not a table of mlx_clex. Give another"):
        opened(tmp_path / "book")
    assert "Moby Dick" in table.read_text()
    opened(tmp_path / "mine").add(row("base", 128, 5.0))
    (tmp_path / "mine.json").unlink()
    assert opened(tmp_path / "mine").rows == []


@pytest.mark.parametrize("prefix", [".", "", "/"])
def test_a_prefix_without_a_name_is_refused(prefix):
    """An empty shell variable ended with a traceback."""
    for use in (opened, read_results):
        with pytest.raises(InputError, match="names no file"):
            use(prefix)


def test_the_largest_perplexity_can_be_read_again(tmp_path):
    """A perplexity above 1e100 was written, and not accepted as a result."""
    opened(tmp_path / "out").add(row("base", 128, exp(800.0)))
    assert read_results(tmp_path / "out").rows[0]["perplexity"] > 1e99


def test_a_second_run_continues_with_the_rows_of_the_first(tmp_path):
    """A row with the keys of an old row must replace it."""
    first = opened(tmp_path / "out")
    first.add(row("base", 128, 5.0))
    first.add(row("base", 256, 6.0))

    second = opened(str(tmp_path / "out.json"))
    assert second.find(label="base", length=256) == row("base", 256, 6.0)
    assert second.find(label="base", length=512) is None
    second.add(row("base", 128, 7.0))

    assert read_results(tmp_path / "out").rows == [row("base", 128, 7.0), row("base", 256, 6.0)]


def test_new_columns_of_later_rows_are_written(tmp_path):
    """csv.DictWriter raises for a column that its first row lacks."""
    results = opened(tmp_path / "out")
    results.add(row("base", 128, 5.0))
    results.add(row("base", 256, 5.0) | {"reach": None})
    header, one, two = (tmp_path / "out.csv").read_text().splitlines()
    assert (header, one, two) == (
        "label,length,perplexity,reach",
        "base,128,5.0,",
        "base,256,5.0,",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_refused(tmp_path, value):
    """perplexity printed nan in its table, wrote null and exited with 0."""
    results = opened(tmp_path / "out")
    results.add(row("base", 64, 4.0))
    with pytest.raises(RunError, match=r"perplexity is (nan|inf) \(label base, length 128\)"):
        results.add(row("base", 128, value))
    assert read_results(tmp_path / "out").rows == [row("base", 64, 4.0)]


def test_without_a_prefix_nothing_is_written(tmp_path, monkeypatch):
    """Without --output the rows stay in memory."""
    monkeypatch.chdir(tmp_path)
    results = opened(None)
    results.add(row("base", 128, 5.0))
    assert results.find(length=128) == row("base", 128, 5.0)
    assert results.path(".png") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "passkey"}, 'kind: "perplexity" in the file, "passkey" now'),
        (
            {"settings": SETTINGS | {"protocol": "chunked"}},
            r'\(protocol: "whole" in the file, "chunked" now\)\. Give another --output, or delete',
        ),
        ({"settings": {"chunks": [1, 2]}}, 'protocol: "whole" in the file, null now'),
    ],
)
def test_results_of_another_run_are_not_mixed(tmp_path, changes, match):
    """The error must name what differs and what to do."""
    opened(tmp_path / "out").add(row("base", 128, 5.0))
    with pytest.raises(InputError, match=match):
        opened(tmp_path / "out", **changes)
    assert read_results(tmp_path / "out").rows


def test_a_file_without_rows_may_be_overwritten(tmp_path):
    """A first run with a wrong option left an empty file, which refused the right option."""
    opened(tmp_path / "out", settings={"protocol": "chunked"})
    assert opened(tmp_path / "out").settings["protocol"] == "whole"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": "perplexity"}', "\xff", '{"rows": [1], "kind": "x"}']
)
def test_other_files_are_refused(tmp_path, text):
    """Reading and writing must both end in one line."""
    (tmp_path / "out.json").write_text(text, encoding="latin-1")
    for read in (read_results, opened):
        with pytest.raises(InputError, match=r"out\.json is not a result file"):
            read(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length", 0),
        ("length", -1),
        ("perplexity", 0.0),
        ("perplexity", -1.0),
        ("high", 1e308),
        ("label", "a\x1b[2J"),
    ],
)
def test_figures_that_cannot_be_are_refused(tmp_path, name, value):
    """A negative perplexity was drawn as any other, and a label cleared the terminal."""
    opened(tmp_path / "out").add(row("base", 128, 5.0) | {name: value})
    with pytest.raises(InputError, match=r"out\.json is not a result file"):
        read_results(tmp_path / "out")


def test_a_missing_file_and_another_kind_are_refused(tmp_path):
    """The error must name the file, and the kinds that were found and expected."""
    with pytest.raises(InputError, match=r"none\.json cannot be read \(No such file"):
        read_results(tmp_path / "none")
    opened(tmp_path / "out")
    assert read_results(tmp_path / "out", "passkey", "perplexity").kind == "perplexity"
    with pytest.raises(InputError, match=r"results of perplexity\. Give .* passkey or compare"):
        read_results(tmp_path / "out", "passkey", "compare")


def test_a_killed_writer_leaves_whole_files(tmp_path):
    """A plain write leaves half a file if the process dies."""
    code = (
        "import sys; from mlx_clex.evaluation.results import open_results\n"
        "out = open_results(sys.argv[1], kind='k', settings={}, keys=['n'])\n"
        "for n in range(10**6):\n"
        "    out.add({'n': n, 'text': 'x' * 5000})\n"
        "    n or print('first', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    rows = read_results(tmp_path / "out").rows
    assert [entry["n"] for entry in rows] == list(range(len(rows)))


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path):
    """The error must come before the measurement and name the option."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output .* cannot be written \(.*\)\. Give another"):
        open_results(tmp_path / "file" / "x", kind="k", settings={}, keys=["a"])


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (perplexity, ("--model", "no/model")),
        (passkey, ("--model", "no/model")),
        (compare, ("no/model", "no/model")),
        (evaluate, ("--model", "no/model", "--tasks", "longbench")),
    ],
    ids=["perplexity", "passkey", "compare", "evaluate"],
)
def test_two_runs_with_one_output_take_turns(command, argv, tmp_path, capsys, monkeypatch):
    """Each read the file, measured for hours, and wrote it without the other's rows."""
    first = holder(tmp_path / "out.json")
    assert first.stdout.readline() == "held\n"
    said = []

    def say(text):
        said.append(text)
        first.communicate("\n", timeout=60)

    monkeypatch.setattr(lock, "say", say)
    assert command.main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert [text.startswith(f"Waiting for process {first.pid}") for text in said] == [True]
    assert "no/model" in capsys.readouterr().err  # only then was the model looked for
