"""What macOS leaves in folders (.DS_Store, ._NAME) is no part of a model or a text."""

import os
import shutil

import pytest
from mlx_clex.convert import convert

from mlx_clex import fuse, loading
from mlx_clex.checkpoint.fingerprint import fingerprint
from mlx_clex.data.corpus import find_files
from mlx_clex.diagnosis.model_report import report
from mlx_clex.loading import load

from ..conftest import GOLDEN, random_adapters

NAMES = (
    ".DS_Store",
    "._model.safetensors",
    "._model.safetensors.index.json",
    "._config.json",
    "._tokenizer.model",
    "._qwen.tiktoken",
    "._m.gguf",
)


def litter(folder):
    """Write the files, or change them if they are there."""
    for name in NAMES:
        with (folder / name).open("ab") as file:
            file.write(b"\x00\x05\x16\x07Mac OS X")
    inside = folder / ".Spotlight"
    inside.mkdir(exist_ok=True)
    (inside / "text.txt").write_text("not a text")


@pytest.fixture
def published(tmp_path):
    """A published checkpoint, which `load` converts once."""
    folder = tmp_path / "gene"
    shutil.copytree(GOLDEN / "gene_param_llama", folder)
    litter(folder)
    return folder


def test_touching_one_converts_no_model_again(published, tmp_path):
    """Opening the folder in the Finder cost another copy of 13 GB each time."""
    cache = tmp_path / "cache"
    model, _ = load(published, cache_dir=cache)
    (made,) = cache.glob("gene@*")
    before = fingerprint(model, made)
    litter(published)
    litter(made)
    os.utime(published / ".DS_Store", (1, 1))
    load(published, cache_dir=cache)
    assert list(cache.glob("gene@*")) == [made]
    assert fingerprint(model, made) == before


def test_a_folder_of_gguf_files_is_still_one(tmp_path, monkeypatch):
    """With a .DS_Store beside it, the folder "has no config.json"."""
    monkeypatch.setattr(loading, "_converted", lambda source, target: target)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    litter(tmp_path)
    assert loading.resolve(tmp_path, cache_dir="kept").parent.name == "kept"


def test_texts_do_not_include_them(tmp_path):
    """The resource fork of a text was read as a text, and was no UTF-8."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a text")
    for name in ("._a.txt", ".b.md", "sub/._a.txt"):
        (tmp_path / name).write_bytes(b"\x00\xff")
    litter(tmp_path)
    assert find_files(tmp_path)["train"] == [tmp_path / "sub" / "a.txt"]


def test_converting_and_fusing_copy_none(published, tmp_path):
    """A tokenizer got a second vocabulary, of 120 bytes."""
    target, adapters = convert(published, tmp_path / "converted"), tmp_path / "adapters"
    assert not [file.name for file in target.iterdir() if file.name.startswith(".")]
    random_adapters(target, adapters, 0)
    for folder in (target, adapters):
        litter(folder)
    argv = ["--model", str(target), "--adapter-path", str(adapters)]
    assert fuse.main([*argv, "--save-path", str(tmp_path / "fused")]) == 0
    names = {file.name for file in (tmp_path / "fused").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith(".")]


def test_doctor_reports_no_problem_of_theirs(published):
    """It said that ._model.safetensors.index.json is not readable."""

    def problems(folder):
        return [text for name, text in report(str(folder)) if name == "problem"]

    assert problems(published) == problems(GOLDEN / "gene_param_llama")
