"""Saves of a run: whole or not there, and changed in one step."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_clex import load
from mlx_clex.errors import InputError
from mlx_clex.training.log import read_log
from mlx_clex.training.saves import Checkpoints

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


def test_the_next_save_deletes_what_a_killed_run_left(base, texts, tmp_path, capsys):
    """A half save had a name without a process, and stayed unless its own number was saved."""
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    left = tmp_path / "a" / "checkpoints" / f"0000007.incomplete-{int(done.stdout)}"
    left.mkdir(parents=True)
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 1")) == 0
    assert [path.name for path in left.parent.iterdir()] == ["0000001"]
    assert f"Deleted {left.name}, which a killed command left." in capsys.readouterr().err


def test_norms_are_those_that_were_trained(base, texts, tmp_path):
    """A file that lacked some of the trained norms loaded, and the base's took their place."""
    adapters = tmp_path / "a"
    assert call(argv_for(base, texts, adapters, "--iters 1 --train-norms-and-embeddings")) == 0
    file, settings = adapters / "norms_embeddings.safetensors", adapters / "adapter_config.json"
    norms: Any = mx.load(str(file))
    whole, config = file.read_bytes(), json.loads(settings.read_text())
    assert config["trained_extra"] == sorted(norms)
    lost = "model.layers.1.input_layernorm.weight"
    mx.save_safetensors(str(file.resolve()), {k: v for k, v in norms.items() if k != lost})
    with pytest.raises(InputError, match=f"lacks {lost}"):
        load(base, adapter_path=adapters)
    more = argv_for(base, texts, tmp_path / "b", "--iters 1 --train-norms-and-embeddings")
    assert call([*more, "--resume-adapter-file", str(adapters)]) == 2
    settings.resolve().write_text(json.dumps(config | {"trained_extra": True}))
    load(base, adapter_path=adapters)  # a save of before
    file.resolve().write_bytes(whole)
    settings.resolve().write_text(json.dumps(config | {"trained_extra": sorted(norms)[1:]}))
    with pytest.raises(InputError, match=f"has {sorted(norms)[0]}, unlike"):
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


STATES = {
    "settings that are a text": lambda state: state.update(same="x"),
    "an iteration of a text": lambda state: state["progress"].update(iteration="1"),
    "a negative iteration": lambda state: state["progress"].update(iteration=-1),
    "losses of NaN": lambda state: state["progress"].update(losses=float("nan")),
    "a place beyond the data": lambda state: state["data"].update(index=1 << 40),
    "a place of a text": lambda state: state["data"].update(index="0"),
    "a generator's state that is a text": lambda state: state["rng"].update(state="x"),
}


def test_a_save_with_values_of_another_kind_is_refused(base, texts, tmp_path, capsys):
    """A run went on from them, or ended with a traceback."""
    adapters = tmp_path / "a"
    assert call(argv_for(base, texts, adapters, "--iters 1")) == 0
    argv = argv_for(base, texts, adapters, "--iters 2", "--resume")
    state, arrays = adapters / "current/state.json", adapters / "current/adapters.safetensors"
    whole, weights = state.read_text(), arrays.read_bytes()
    for name, change in STATES.items():
        entries = json.loads(whole)
        change(entries)
        state.write_text(json.dumps(entries))
        assert call(argv) == 2, name
        assert "is damaged" in capsys.readouterr().err, name
    state.write_text(whole)
    loaded = mx.load(str(arrays))
    mx.eval(loaded)
    for name, change, words in [
        ("NaN", lambda a: a * float("nan"), "not finite"),
        ("flat", lambda a: a.reshape(-1), "it must be"),
        ("whole numbers", lambda a: a.astype(mx.int32), "it must be"),
    ]:
        mx.save_safetensors(str(arrays), {key: change(a) for key, a in loaded.items()})
        assert call(argv) == 2, name
        assert words in capsys.readouterr().err, name
    arrays.write_bytes(weights)
    assert call(argv) == 0


def test_saves_that_lead_out_of_the_folder_are_refused(tmp_path):
    """A resumed run wrote where a link in a stranger's folder led."""
    for name in ("checkpoints", "current"):
        folder, outside = tmp_path / name, tmp_path / f"outside-{name}"
        folder.mkdir()
        outside.mkdir()
        (folder / name).symlink_to(outside)
        with pytest.raises(InputError, match="leads out of its folder"):
            Checkpoints(folder, keep=1)


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
