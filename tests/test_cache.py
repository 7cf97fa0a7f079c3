"""The cache command lists and deletes entries, and leftovers of killed commands."""

import subprocess
import sys

import pytest

from mlx_clex import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "DEFAULT_CACHE", tmp_path)
    for name, size in (("my-model@0123456789ab-1", 3_000_000), ("tokens", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(size))
    return tmp_path


def call(*argv):
    return cache.main(argv)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_entries_are_listed_with_size_and_age(folder, capsys):
    """Conversions of 13 GB stayed, and nothing said where."""
    assert call() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["0.00", "GB", "new", "my-model@0123456789ab-1"]
    assert lines[2].endswith(f"GB in {folder}")


def test_entries_are_deleted_by_name_or_all(folder, capsys):
    """A misspelt name deletes nothing and is answered with the nearest."""
    assert call("--delete", "tokens", "my-model") == 2
    assert "Did you mean my-model@0123456789ab-1?" in capsys.readouterr().err
    assert call("--delete", "tokens") == 0
    assert names(folder) == ["my-model@0123456789ab-1"]
    assert call("--delete-all") == 0
    assert names(folder) == []


def test_leftovers_of_killed_commands_go_and_others_stay(folder, capsys):
    """A killed conversion left 13 GB under a name that nothing mentioned."""
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    gone = f"other@0-1.incomplete-{int(done.stdout)}"
    running = "other@0-1.incomplete-1"
    for name in (gone, running):
        (folder / name).mkdir()
    assert call() == 0
    assert f"Deleted {gone}, which a killed command left." in capsys.readouterr().err
    assert running in names(folder)
    assert gone not in names(folder)


def test_a_folder_that_is_not_there_is_empty(tmp_path, monkeypatch, capsys):
    """Before the first conversion there is none."""
    monkeypatch.setattr(cache, "DEFAULT_CACHE", tmp_path / "none")
    assert call() == 0
    assert call("--delete", "x") == 2
    assert "has no entries" in capsys.readouterr().err
