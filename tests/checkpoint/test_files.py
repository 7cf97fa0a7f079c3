"""A target is whole and on the disk, or absent."""

import os
from pathlib import Path

import pytest

from mlx_clex.checkpoint.files import new_file, new_folder


@pytest.fixture
def events(monkeypatch):
    """What is flushed and renamed, in order, by inode."""
    found = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def flushed(handle):
        found.append(("flushed", os.fstat(handle).st_ino))
        fsync(handle)

    def moved(how):
        def move(path, target):
            found.append(("renamed", path.stat().st_ino))
            return how(path, target)

        return move

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", moved(rename))
    monkeypatch.setattr(Path, "replace", moved(replace))
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, events):
    """After a power cut, the right name had an empty file."""
    with new_file(tmp_path / "a.json") as path:
        path.write_text("{}")
    file, folder = (tmp_path / "a.json").stat().st_ino, tmp_path.stat().st_ino
    assert events == [("flushed", file), ("renamed", file), ("flushed", folder)]


@pytest.mark.parametrize("replace", [False, True])
def test_so_is_a_folder_with_all_that_is_in_it(tmp_path, events, replace):
    """A save had its name, and one of its files was empty."""
    target = tmp_path / "target"
    if replace:
        target.mkdir()
        (target / "old").touch()
    with new_folder(target, replace=replace) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(b"1")
    inside = [path.stat().st_ino for path in (target / "sub" / "weights", target / "sub", target)]
    renamed = events.index(("renamed", inside[-1]))
    assert {("flushed", inode) for inode in inside} == set(events[:renamed])
    assert events[renamed + 1 :] == [("flushed", tmp_path.stat().st_ino)]
    assert not (target / "old").exists()
