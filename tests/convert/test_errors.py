"""Bad input to the converter: one clear line, exit status 2, nothing left behind."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_clex.convert import convert
from mlx_clex.convert.__main__ import main

from mlx_clex.checkpoint import safetensors_file
from mlx_clex.errors import InputError

from ..conftest import GOLDEN, stock_folder


def edit(folder: Path, change: Any) -> None:
    """Change config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def scaling(**entries: Any) -> Any:
    """Return a change of rope_scaling."""
    return lambda folder: edit(folder, lambda config: config["rope_scaling"].update(entries))


def config(**entries: Any) -> Any:
    return lambda folder: edit(folder, lambda config: config.update(entries))


def without(key: str) -> Any:
    return lambda folder: edit(folder, lambda config: config.pop(key))


def tensors(change: Any) -> Any:
    """Return a change of the tensors of a safetensors checkpoint in one file."""

    def apply(folder: Path) -> None:
        loaded: Any = mx.load(str(folder / "model.safetensors"))
        change(loaded)
        mx.save_safetensors(str(folder / "model.safetensors"), loaded)

    return apply


def quantised_with(method: str) -> Any:
    """Return a change to a config that names a quantisation, and to one packed tensor."""
    pack = tensors(lambda loaded: loaded.update({Q: mx.zeros(loaded[Q].shape, mx.uint8)}))

    def apply(folder: Path) -> None:
        config(quantization_config={"quant_method": method})(folder)
        pack(folder)

    return apply


def truncate(name: str) -> Any:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return apply


def overwrite(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Any:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def cut_record(folder: Path) -> None:
    """Shorten one record of a .bin file; a mapping torch reads into the next one."""
    file = folder / SHARD
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("/data/0"))
    records[name] = records[name][:2]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def expand(folder: Path) -> None:
    """Return a tensor of a terabyte that stores one number."""
    torch.save({UP: torch.zeros(1).expand(1 << 20, 1 << 18)}, folder / SHARD)


def make_sparse(folder: Path) -> None:
    torch.save({UP: torch.eye(4).to_sparse()}, folder / SHARD)


SHARD = "pytorch_model-00001-of-00002.bin"
UP = "model.clex_layer.proj_func.ode_up_proj"
Q = "model.layers.1.self_attn.q_proj.weight"


def other_tokenizer(data: bytes) -> Any:
    """In the place of the SentencePiece model."""

    def apply(folder: Path) -> None:
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer.json").write_bytes(data)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')

    return apply


def words_to(count: int) -> bytes:
    """A tokenizer.json of so many words."""
    vocabulary = {f"word{index}": index for index in range(count)}
    model = tokenizers.models.WordLevel(vocabulary, "word0")
    return tokenizers.Tokenizer(model).to_str().encode()


BROKEN = {
    # name: (golden checkpoint, damage, part of the message)
    "a record cut short": ("clex_llama", cut_record, "corrupt or truncated"),
    "a tensor larger than its file": ("clex_llama", expand, "more than the whole file"),
    "a sparse tensor": ("clex_llama", make_sparse, "only tensors of numbers"),
    "a billion layers": ("clex_phi", config(num_hidden_layers=10**9), "num_hidden_layers"),
    "a width of a billion": ("clex_phi", config(hidden_size=10**9), "hidden_size"),
    "no vocabulary": ("clex_phi", config(vocab_size=0), "vocab_size"),
    "a trillion scales": ("clex_phi", scaling(max_factor=10**12), "max_factor"),
    "a name that counts to a billion": (
        "clex_phi",
        lambda folder: (folder / "model.safetensors").rename(
            folder / "model-00002-of-99999999999.safetensors"
        ),
        "lacks shard 1 of 99999999999",
    ),
    "metadata no texts": (
        "clex_phi",
        overwrite("model.safetensors", (26).to_bytes(8, "little") + b'{"__metadata__":{"a":[1]}}'),
        "model.safetensors",
    ),
    "no weights": ("clex_phi", remove("model.safetensors"), "has no weights"),
    "no config": ("clex_phi", remove("config.json"), "no config.json"),
    "config no JSON": ("clex_phi", overwrite("config.json", b"{"), "not readable JSON"),
    "config no object": ("clex_phi", overwrite("config.json", b"[]"), "is not a JSON object"),
    "no model_type": ("clex_phi", without("model_type"), "no model_type"),
    "unknown family": ("clex_phi", config(model_type="nope"), "'nope'"),
    "key of the family missing": (
        "gene_param_llama",
        without("intermediate_size"),
        "intermediate_size",
    ),
    "cut safetensors": ("clex_phi", truncate("model.safetensors"), "corrupt or truncated"),
    "empty safetensors": ("clex_phi", overwrite("model.safetensors", b""), "corrupt or truncated"),
    "safetensors of noise": (
        "clex_phi",
        overwrite("model.safetensors", b"\x10\0\0\0\0\0\0\0" + b"x" * 90),
        "header is not readable",
    ),
    "cut .bin": ("clex_llama", truncate(SHARD), "corrupt"),
    ".bin of noise": ("clex_llama", overwrite(SHARD, b"noise" * 99), "corrupt"),
    ".bin of a list": (
        "clex_llama",
        lambda folder: torch.save([1, 2], folder / SHARD),
        "not a dictionary of tensors",
    ),
    ".bin of words": (
        "clex_llama",
        lambda folder: torch.save({"a": "b"}, folder / SHARD),
        "only tensors of numbers",
    ),
    "shard missing": (
        "clex_llama_gqa_log_scale",
        remove("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors",
    ),
    "shard missing without index": (
        "clex_llama",
        remove(SHARD, "pytorch_model.bin.index.json"),
        "shard 1 of 2",
    ),
    "index names a path": (
        "clex_phi",
        overwrite("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'),
        "no file name",
    ),
    "tensor missing": ("clex_phi", tensors(lambda t: t.pop(Q)), f"lacks the tensor {Q}"),
    "scaling's tensor missing": (
        "clex_phi",
        tensors(lambda t: t.pop(UP)),
        "lacks the tensor scaling.up_proj",
    ),
    "tensor extra": (
        "clex_phi",
        tensors(lambda t: t.update(extra=mx.zeros((3,)))),
        "has the tensor extra",
    ),
    "tensor of the wrong shape": (
        "clex_phi",
        tensors(lambda t: t.update({Q: mx.zeros((3, 5))})),
        f"The tensor {Q} has shape (3, 5)",
    ),
    "a layer's coefficients missing": (
        "gene_param_llama",
        tensors(
            lambda t: t.pop("model.layers.0.self_attn.rotary_emb.inv_angular_velocity.base_coef")
        ),
        "scaling.base_coef in layer 0",
    ),
    "experts missing": (
        "clex_mixtral",
        config(num_local_experts=5),
        "experts.4.w1.weight",
    ),
    "unknown scaling": ("clex_phi", scaling(type="clexx"), "'clexx'"),
    "unknown key": ("clex_phi", scaling(max_facter=8), "'max_facter'"),
    "max_factor below 1": ("clex_phi", scaling(max_factor=0), "max_factor"),
    "param_factor of other weights": ("clex_phi", scaling(param_factor=3), "scaling.up_proj"),
    "odd rotated dimensions": ("clex_phi", config(partial_rotary_factor=0.45), "even"),
    "two rotated dimensions": ("clex_phi", config(partial_rotary_factor=0.125), "at least 4"),
    "factor below training_seq_len / L0": ("gene_llama", scaling(factor=1.0), "training_seq_len"),
    "grouped heads with gene-param": (
        "gene_param_llama",
        config(num_key_value_heads=2),
        "key heads",
    ),
    "quantised by others": (
        "clex_phi",
        quantised_with("gptq"),
        "quantised with 'gptq'",
    ),
    "a tokenizer.json of noise": ("clex_phi", other_tokenizer(b"noise"), "no tokenizer that loads"),
    "an empty tokenizer.json": ("clex_phi", other_tokenizer(b"{}"), "no tokenizer that loads"),
    "another model's tokenizer": (
        "clex_phi",
        other_tokenizer(words_to(900)),
        "ids up to 899, but its model's vocab_size is 512",
    ),
    "an end that is a word": ("clex_phi", config(eos_token_id="</s>"), "'</s>'"),  # noqa: S106 - no password
    "an end of generation_config.json": (
        "clex_phi",
        overwrite("generation_config.json", b'{"eos_token_id": [2, true]}'),
        "eos_token_id [2, True]",
    ),
    "a type that is none": ("clex_phi", config(torch_dtype="heavy"), "torch_dtype 'heavy'"),
    "a type that is a number": ("clex_phi", config(dtype=16), "dtype 16"),
    "tied by a word": ("clex_phi", config(tie_word_embeddings="yes"), "tie_word_embeddings 'yes'"),
    "NaN in the scaling": (
        "clex_phi",
        tensors(lambda t: t.update({UP: t[UP] * float("nan")})),
        "scaling.up_proj has values that are not finite",
    ),
    "tokenizer of noise": (
        "clex_phi",
        overwrite("tokenizer.model", b"noise"),
        "no SentencePiece model",
    ),
}

OPTIONS = {
    # name: (options, part of the message)
    "missing folder": (["--hf-path", "./nowhere"], "no folder or file './nowhere'"),
    "a file": (["--hf-path", str(GOLDEN / "clex_phi" / "config.json")], "is a file"),
    "revision of a folder": (["--revision", "main"], "is for hub ids"),
    "both -q and -d": (["-q", "-d"], "not both"),
    "predicate without -q": (["--quant-predicate", "mixed_2_6"], "needs -q"),
    "group size that mlx has not": (
        ["-q", "--q-group-size", "8"],
        "does not accept these quantisation options",
    ),
    "a group no layer can have": (["-q", "--q-group-size", "48"], "quantise nothing"),
    "an empty target": (["--mlx-path", ""], "needs a name"),
    "an empty source": (["--hf-path", ""], "no folder or file ''"),
    "a .gguf that is not there": (["--hf-path", "nope.gguf"], "no folder or file 'nope.gguf'"),
    "a target inside a file": (["--mlx-path", f"{__file__}/x"], "is a file"),
    "bits that mlx has not": (
        ["-q", "--q-bits", "9"],
        "does not accept these quantisation options",
    ),
    "a mode without -q": (["--q-mode", "mxfp4"], "--q-mode need -q"),
    "settings without --scaling": (["--max-factor", "8"], "--max-factor needs --scaling"),
    "settings of another method": (
        ["--scaling", "yarn", "--max-factor", "8"],
        "--scaling yarn has no --max-factor",
    ),
    "scaling over trained weights": (["--scaling", "yarn"], "would discard them"),
    "trained length": (["--trained-length", "1"], "at least 2"),
    "freeze below 1": (["--freeze", "0.5"], "0.5"),
    "freeze beyond max_factor": (["--freeze", "9"], "9"),
    "--for without --freeze": (["--for", "transformers"], "--freeze SCALE"),
    "malformed upload id": (["--upload-repo", "a/b/c"], "no hub id"),
}


def check_refused(argv: list[str], part: str, tmp_path: Path, capsys: Any) -> None:
    """Check for exit status 2, one line with `part` in it, and no target folder."""
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    status = main(["--mlx-path", str(tmp_path / "new" / "out"), *argv])

    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mlx_clex convert")]
    assert status == 2, captured.err
    assert len(lines) == 1
    assert part in lines[0]
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(tmp_path, capsys, case):
    """Each kind of damage must be named, before anything is written."""
    name, damage, part = BROKEN[case]
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / name, source, ignore=shutil.ignore_patterns("golden.*"))
    damage(source)

    check_refused(["--hf-path", str(source)], part, tmp_path, capsys)


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_work_is_refused(tmp_path, capsys, case):
    """Each error must say what the option needs."""
    options, part = OPTIONS[case]

    argv = ["--hf-path", str(GOLDEN / "clex_phi"), *options]
    check_refused(argv, part, tmp_path, capsys)


def test_an_empty_folder_is_refused(tmp_path, capsys):
    """A download that never began leaves an empty folder."""
    (tmp_path / "empty").mkdir()

    check_refused(["--hf-path", str(tmp_path / "empty")], "is empty", tmp_path, capsys)


def test_a_target_that_exists_is_left_alone(tmp_path, capsys):
    """The target may hold another model."""
    (tmp_path / "new" / "out").mkdir(parents=True)
    (tmp_path / "new" / "out" / "theirs").write_text("precious")

    check_refused(["--hf-path", str(GOLDEN / "clex_phi")], "exists already", tmp_path, capsys)
    assert (tmp_path / "new" / "out" / "theirs").read_text() == "precious"


def test_a_full_disk_is_noticed_before_writing(tmp_path, capsys, monkeypatch):
    """A conversion of hours must not fail on a disk that was too small from the start."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    check_refused(["--hf-path", str(GOLDEN / "clex_phi")], "needs 0.06 GB", tmp_path, capsys)


class Hostile:
    """A pickle that runs a command when it is loaded without weights_only."""

    def __reduce__(self):
        import os

        return os.system, ("touch $TMPDIR_OF_TEST/ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_runs_nothing(tmp_path, capsys, monkeypatch, zipped):
    """A .bin file can run code unless it is read as data."""
    monkeypatch.setenv("TMPDIR_OF_TEST", str(tmp_path))
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "clex_llama", source, ignore=shutil.ignore_patterns("golden.*"))
    if zipped:
        torch.save({"model.norm.weight": Hostile()}, source / SHARD)
    else:
        (source / SHARD).write_bytes(pickle.dumps({"model.norm.weight": Hostile()}, protocol=2))

    check_refused(
        ["--hf-path", str(source)],
        "asks to run posix.system; mlx_clex never runs code",
        tmp_path,
        capsys,
    )
    assert not (tmp_path / "ran").exists()


def test_python_files_of_the_source_are_not_run(tmp_path):
    """Published folders contain modeling files; even a sitecustomize must not run."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "clex_phi", source, ignore=shutil.ignore_patterns("golden.*"))
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("modeling_phi2_clex.py", "configuration_phi2_clex.py", "tokenization.py"):
        (source / name).write_text(trap)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization.Own", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    command = [sys.executable, "-m", "mlx_clex.convert", "--hf-path", source]

    done = subprocess.run(
        [*command, "--mlx-path", tmp_path / "out"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    assert [file.name for file in (tmp_path / "out").glob("*.py")] == ["mlx_clex_model.py"]


def test_without_torch_a_bin_checkpoint_names_the_extra(tmp_path, capsys, monkeypatch):
    """torch is an extra: the error must say which."""
    monkeypatch.setitem(sys.modules, "torch", None)

    argv = ["--hf-path", str(GOLDEN / "clex_llama")]
    check_refused(argv, "pip install 'mlx-clex[bin]'", tmp_path, capsys)


def test_a_disk_that_fills_up_meanwhile_is_a_failed_run(tmp_path, capsys, monkeypatch):
    """Exit status 1: the input was good."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_clex.convert.write.output.finite_bytes", full)
    argv = ["--hf-path", str(GOLDEN / "clex_phi"), "--mlx-path", str(tmp_path / "out")]
    assert main(argv) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


_size = st.integers(-2, 70) | st.just(2**63)
_entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "nope"]) | st.none(),
        "shape": st.lists(_size, max_size=3) | st.text(max_size=2),
        "data_offsets": st.lists(_size, max_size=3) | st.integers(),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=3), _entry | st.integers(), max_size=3)
    | st.lists(st.integers(), max_size=2)
    | st.integers(),
    data=st.binary(max_size=64),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_is_read_or_refused(tmp_path_factory, header, data, length):
    """A hostile header must not end in a traceback, nor in reading past the file."""
    text = json.dumps(header).encode()
    size = len(text) if length is None else length
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(size.to_bytes(8, "little") + text + data)
    try:
        infos = safetensors_file.read_header(file)
    except InputError:
        return

    assert sum(info.nbytes for info in infos.values()) == len(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize": True, "q_group_size": 32},  # mx.quantize takes NaN for a finite number
        {"quantize": True, "q_group_size": 32, "q_mode": "mxfp4"},
        {"freeze": 4, "freeze_for": "transformers"},
        {"freeze": 4, "freeze_for": "llama.cpp"},
    ],
    ids=["plain", "affine", "mxfp4", "transformers", "llama.cpp"],
)
def test_weights_that_are_not_finite_are_not_copied(tmp_path, value, options):
    """convert ended with status 0; with -q the NaN became a number, which no reader could see."""
    source = stock_folder(tmp_path, GOLDEN / "clex_llama", max_position_embeddings=64)

    def change(found: dict[str, mx.array]) -> None:
        found["model.layers.1.self_attn.q_proj.weight"][3, 5] = value

    tensors(change)(source)
    with pytest.raises(InputError, match=r"(layers|blk).1.\S*q\S* has values that are not finite"):
        convert(source, tmp_path / "out", scaling={"type": "ntk", "factor": 4}, **options)
    assert not list(tmp_path.glob("out*"))


def test_numbers_too_large_for_float16_are_not_made_infinite(tmp_path):
    """--dtype float16 wrote infinity for 1e6, and ended with status 0."""
    source = stock_folder(tmp_path, GOLDEN / "clex_llama", max_position_embeddings=64)
    tensors(lambda found: found.update({"model.norm.weight": found["model.norm.weight"] * 1e6}))(
        source
    )
    with pytest.raises(InputError, match=r"model.norm.weight .* not finite as float16"):
        convert(source, tmp_path / "out", dtype="float16")
