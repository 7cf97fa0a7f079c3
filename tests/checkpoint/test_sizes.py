"""Sizes in a stranger's files must be held against the files before memory is taken."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import torch
from mlx_clex.convert.read.torch_pickle import read_tensors

from mlx_clex import generate
from mlx_clex.checkpoint import files, folder
from mlx_clex.checkpoint.safetensors_file import read_header
from mlx_clex.errors import InputError

from ..conftest import GOLDEN


@pytest.fixture
def model(converted, tmp_path):
    return shutil.copytree(converted("clex_phi"), tmp_path / "model")


def change(model, **entries):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def refused(model, capsys):
    """The one line with which generate ends."""
    status = generate.main(["--model", str(model), "--prompt", "a", "--max-tokens", "1"])
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("mlx_clex generate: error")]
    return line


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 1 << 20},
        {"vocab_size": 1 << 24},
        {"intermediate_size": 1 << 22},
        {"num_attention_heads": 1 << 16},
        {"num_hidden_layers": 10_000},
        {"model_type": "gpt2", "n_embd": 1 << 20, "n_layer": 4},
    ],
)
def test_a_config_beyond_its_files_is_refused(model, capsys, sizes):
    """hidden_size 1,048,576 ended the process; 10,000 layers took 2 GB and minutes."""
    change(model, **sizes)

    line = refused(model, capsys)

    assert "its weight files hold" in line or "does not load" in line


def test_special_files_are_not_opened(model, capsys):
    """A fifo as an index waited for ever, and config.json linked to /dev/zero filled the memory."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "x.index.json"):
        kept = (model / name).read_bytes() if (model / name).exists() else None
        for kind in ("fifo", "zero", "folder"):
            (model / name).unlink(missing_ok=True)
            if kind == "fifo":
                os.mkfifo(model / name)
            elif kind == "zero":
                (model / name).symlink_to("/dev/zero")
            else:
                (model / name).mkdir()
            line = refused(model, capsys)
            assert "is not a regular file" in line or "link that leads out" in line
            if kind == "folder":
                (model / name).rmdir()
        (model / name).unlink(missing_ok=True)
        if kept is not None:
            (model / name).write_bytes(kept)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """Its snapshots are links to blobs; no other link may leave the folder."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    assert [file.name for file in folder.files_of(snapshot)] == ["config.json"]

    (tmp_path / "secret").write_text("{}")
    (snapshot / "generation_config.json").symlink_to("../../secret")
    with pytest.raises(InputError, match="leads out of its folder"):
        folder.files_of(snapshot)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "recursion"),
        ("[" * 100 + "]" * 100, "nested more than 64 deep"),
        ("9" * 5000, "digits"),
    ],
)
def test_deep_json_is_one_line(tmp_path, text, words):
    """RecursionError ended in a traceback."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=words):
        files.read_json(tmp_path / "a.json")


def test_a_header_of_too_many_tensors_is_refused(tmp_path):
    """900,000 empty tensors took 1.2 GB."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{i}": entry for i in range(160_000)}, separators=(",", ":")).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(InputError, match="more than 100,000 tensors"):
        read_header(tmp_path / "a.safetensors")


class Huge:
    def __reduce__(self):
        return bytearray, (1 << 34,)


def old(value):
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def packed():
    """A zip bomb: a record of 64 MB of zeros, compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("a/data/0", bytes(1 << 26))
    return out.getvalue()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pickle.dumps({"a": Huge()}, protocol=2), "asks to run __builtin__.bytearray"),
        (lambda: old({"a": Huge()}), "asks to run __builtin__.bytearray"),
        (packed, "compressed records"),
        (lambda: b"\x80\x02" + b"]" * 900_000, "corrupt|more than 20,000 tensors"),
        (lambda: old({"a": torch.zeros(4)})[:-10], "cut short"),
        (
            lambda: old({"a": torch.zeros(4)}).replace(
                b"cpuq\x06K\x04", b"cpuq\x06J\xff\xff\xff\x7f"
            ),
            "cut",
        ),
        (
            lambda: (GOLDEN / "clex_llama" / "pytorch_model-00001-of-00002.bin").read_bytes()[
                :50_000
            ],
            "corrupt",
        ),
    ],
)
def test_a_pickle_is_checked_before_torch_sees_it(tmp_path, make, words):
    """bytearray(1 << 34) in a kilobyte took 16 GB; a cut file was "[Errno 22]", without a name."""
    (tmp_path / "a.bin").write_bytes(make())
    with pytest.raises(InputError, match=words) as caught:
        read_tensors(tmp_path / "a.bin")
    assert "a.bin" in str(caught.value)


@pytest.mark.parametrize("new", [True, False])
def test_what_torch_saves_is_read(tmp_path, new):
    """The reader must take both formats, shared data and views."""
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "b": whole.T, "c": torch.nn.Parameter(torch.ones(2).bfloat16())}
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=new)
    tensors = read_tensors(tmp_path / "a.bin")
    found = {name: (tensor.info.dtype, tensor.shape) for name, tensor in tensors.items()}
    assert found == {"a": ("F32", (3, 4)), "b": ("F32", (4, 3)), "c": ("BF16", (2,))}
