"""Saves of a run: whole or not there, and changed in one step."""

import json
from pathlib import Path

import pytest

from mlx_clex import load
from mlx_clex.training.log import read_log

from .commands import argv_for, call

pytestmark = pytest.mark.usefixtures("eager")


def test_a_full_disk_leaves_the_save_before(base, texts, tmp_path, monkeypatch, capsys):
    """Exit 1, one line, and the links still lead to a whole save."""
    from mlx_clex.training import saves as checkpoints

    adapters = tmp_path / "a"
    real, writes = checkpoints.write, []

    def full(path, *args):
        writes.append(path)
        if len(writes) > 3:  # in the second save
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(path, *args)

    monkeypatch.setattr(checkpoints, "write", full)
    assert call(argv_for(base, texts, adapters, "--iters 4 --save-every 1")) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in (adapters / "checkpoints").iterdir()] == ["0000001"]
    load(base, adapter_path=adapters)


def test_the_root_changes_in_one_step(base, texts, tmp_path):
    """All files at the root go through one link, so none is of another save."""
    adapters = tmp_path / "a"
    more = "--iters 2 --save-every 1 --scaling-learning-rate 1e-5"
    assert call(argv_for(base, texts, adapters, more)) == 0
    for name in ("adapters.safetensors", "adapter_config.json", "scaling.safetensors"):
        assert (adapters / name).readlink() == Path("current", name)
    assert (adapters / "current").readlink() == Path("checkpoints/0000002")
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["trained_scaling"] is True


@pytest.mark.parametrize(
    ("name", "kept"), [("optimizer.safetensors", 50), ("state.json", 50), ("state.json", 0)]
)
def test_a_damaged_save_is_one_line(base, texts, tmp_path, name, kept, capsys):
    """It says how to go on; without a state a resumed run began anew, over the saves."""
    adapters = tmp_path / "a"
    assert call(argv_for(base, texts, adapters, "--iters 4 --save-every 2")) == 0
    file = adapters / "current" / name
    data = file.read_bytes()
    file.unlink()
    if kept:
        file.write_bytes(data[:kept])
    argv = argv_for(base, texts, adapters, "--iters 6 --save-every 2", "--resume")
    assert call(argv) == 2
    assert f"point the link {adapters / 'current'} there" in capsys.readouterr().err
    (adapters / "current").unlink()
    (adapters / "current").symlink_to("checkpoints/0000002")
    assert call(argv) == 0
    assert [line["iteration"] for line in read_log(adapters / "log.jsonl") if "loss" in line] == [
        *range(1, 7)
    ]
