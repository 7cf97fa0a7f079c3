"""What the converter writes: tensors, config, card."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import pytest
import torch
from mlx_clex.convert import convert
from mlx_clex.convert.resolve import find
from mlx_clex.convert.write.card import scale_table

import mlx_clex
from mlx_clex.scaling import build_scaling

from ..checkpoints import copy_golden, read_config, read_tensors
from ..conftest import GOLDEN, GOLDEN_NAMES


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_tensors_arrive_unchanged_under_our_names(converted, name):
    """Every published weight must be written bit for bit, and no other tensor."""
    theirs = read_tensors(GOLDEN / name)
    ours = read_tensors(converted(name))

    for key, array in theirs.items():
        if key.endswith(".inv_freq"):
            continue  # follows from rope_theta
        if "ode_" in key:
            new = ours.pop("scaling." + key.rpartition("ode_")[2])
            assert new.dtype == mx.float32
        elif "_coef" in key:
            _, _, layer, *_, leaf = key.split(".")
            new = ours["scaling." + leaf][int(layer)]
            assert new.dtype == mx.float32
        elif ".experts." in key:
            prefix, _, (index, part, leaf) = _split_expert(key)
            new = ours[f"{prefix}.switch_mlp.{part}.{leaf}"][index]
        else:
            new = ours.pop(key)
        assert mx.array_equal(new, array.astype(new.dtype)), key
    left = [key for key in ours if "_coef" not in key and "switch_mlp" not in key]
    assert left == []


def test_a_bundled_model_is_a_source(tmp_path):
    """`convert --hf-path bundled:base` said: no such file; did you mean bundled:base?"""
    made = convert("bundled:base", tmp_path / "long", scaling={"type": "yarn", "factor": 4})
    assert read_config(made)["rope_scaling"]["type"] == "yarn"
    assert "bundled:base" in (made / "README.md").read_text()


def _split_expert(key: str) -> tuple[str, str, tuple[int, str, str]]:
    prefix, rest = key.split(".experts.")
    index, part, leaf = rest.split(".")
    name = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[part]
    return prefix, rest, (int(index), name, leaf)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_converted_folder_holds_what_loaders_need_and_no_code_of_strangers(converted, name):
    """Stock mlx-lm would run a copied modeling file."""
    names = {file.name for file in (converted(name)).iterdir()}
    config = read_config(converted(name))

    assert {file for file in names if file.endswith(".py")} == {"mlx_clex_model.py"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert config["model_file"] == "mlx_clex_model.py"
    assert "auto_map" not in config
    assert config["rope_scaling"]["type"] in ("clex", "gene", "gene-param")
    assert config["rope_theta"] == read_config(GOLDEN / name)["rope_theta"]
    assert not list(converted(name).parent.glob("*.incomplete-*"))


@pytest.mark.parametrize("name", ["clex_llama", "clex_mixtral", "gene_param_llama"])
def test_quantising_leaves_the_scaling_alone(converted, tmp_path, name):
    """Four-bit network weights would change every frequency of the model."""
    convert(GOLDEN / name, tmp_path / "q", quantize=True, q_bits=4, q_group_size=32)

    plain, small = read_tensors(converted(name)), read_tensors(tmp_path / "q")
    for key in plain:
        if key.startswith("scaling."):
            assert mx.array_equal(plain[key], small[key])
    assert small["model.embed_tokens.weight"].dtype == mx.uint32
    assert read_config(tmp_path / "q")["quantization"]["bits"] == 4
    model, _ = mlx_clex.load(tmp_path / "q")
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 512)

    convert(tmp_path / "q", tmp_path / "d", dequantize=True)

    back = read_tensors(tmp_path / "d")
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in plain.items()}
    assert "quantization" not in read_config(tmp_path / "d")


def test_mixed_bits_are_those_of_mlx_lm(tmp_path):
    """--quant-predicate must reach mlx-lm's recipes."""
    convert(GOLDEN / "clex_llama", tmp_path / "q", quantize=True, quant_predicate="mixed_3_6")

    bits = {
        value["bits"]
        for value in read_config(tmp_path / "q")["quantization"].values()
        if isinstance(value, dict)
    }
    assert bits == {3, 6}


@pytest.mark.parametrize("name", ["clex_llama", "gene_param_llama"])
def test_casting_leaves_the_scaling_in_float32(tmp_path, name):
    """--dtype is for the model's weights only."""
    convert(GOLDEN / name, tmp_path / "half", dtype="float16")

    for key, array in read_tensors(tmp_path / "half").items():
        assert array.dtype == (mx.float32 if key.startswith("scaling.") else mx.float16), key


def test_stock_mlx_lm_runs_and_converts_the_folder(converted, tmp_path):
    """The folder is an ordinary MLX checkpoint wherever mlx_clex is installed."""
    folder = converted("clex_llama")
    ids = mx.array([[1, 5, 9, 200]])
    model, _ = mlx_lm.load(str(folder), trust_remote_code=True)
    ours, _ = mlx_clex.load(folder)

    assert mx.array_equal(model(ids), ours(ids))

    mlx_lm.convert(
        str(folder),
        str(tmp_path / "q"),
        quantize=True,
        q_group_size=32,
        trust_remote_code=True,
    )

    tensors = read_tensors(tmp_path / "q")
    assert tensors["scaling.up_proj"].dtype == mx.float32
    again, _ = mlx_clex.load(tmp_path / "q")
    assert again(ids).shape == (1, 4, 512)


@pytest.fixture
def base(tmp_path):
    """A plain LLaMA checkpoint, without any scaling, as one safetensors file."""
    source = copy_golden("gene_llama", tmp_path)
    tensors = read_tensors(source)
    for file in source.glob("pytorch_model*"):
        file.unlink()
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    config = read_config(source)
    config["rope_scaling"] = None
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_a_base_model_gets_fresh_clex_weights(base, tmp_path):
    """With W_down 0 a fresh CLEX is NTK-aware scaling, so the model works untrained."""
    entry = {"type": "clex", "max_factor": 8, "param_factor": 2}
    convert(base, tmp_path / "out", scaling=entry, trained_length=32)

    tensors, config = read_tensors(tmp_path / "out"), read_config(tmp_path / "out")
    assert tensors["scaling.up_proj"].shape == (8, 32)
    assert 0 < mx.abs(tensors["scaling.up_proj"]).max().item() <= (2 * 16) ** -0.5
    assert not mx.any(tensors["scaling.down_proj"]).item()
    assert config["max_position_embeddings"] == 32
    assert config["rope_scaling"] == {
        **entry,
        "act": "tanh",
        "factor": 1.0,
        "time_dt": 0.01,
        "log_scale": False,
        "log_gain": False,
    }
    model, tokenizer = mlx_clex.load(tmp_path / "out")
    assert model.reach == tokenizer.model_max_length == 256


@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic", "yarn", "gene", "gene-param"])
def test_every_scaling_can_be_switched_on(base, tmp_path, name):
    """A scaling without an entry in the converter could not be used at all."""
    convert(base, tmp_path / "out", scaling={"type": name, "factor": 4})

    model, tokenizer = mlx_clex.load(tmp_path / "out")
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 512)
    # It was the trained length for every scaling without learned tensors.
    assert model.reach == (None if name == "dynamic" else 256)
    assert tokenizer.model_max_length == (model.reach or 64)


def test_a_plain_checkpoint_stays_plain(base, tmp_path):
    """A checkpoint without a scaling needs no shim."""
    convert(base, tmp_path / "out")

    assert "model_file" not in read_config(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    mlx_lm.load(str(tmp_path / "out"))


def test_safetensors_win_over_a_stale_bin_index(tmp_path):
    """Some published folders keep the .bin index of an older revision."""
    source = copy_golden("clex_phi", tmp_path)
    index = {"weight_map": {"model.embed_tokens.weight": "pytorch_model-00001-of-00002.bin"}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    assert [file.name for file in find(source).files] == ["model.safetensors"]


def test_untied_heads_are_kept_where_the_config_does_not_say(tmp_path):
    """mlx-lm's LLaMA ties by default and would drop lm_head silently."""
    source = copy_golden("gene_param_llama", tmp_path)
    config = read_config(source)
    del config["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))

    convert(source, tmp_path / "out")

    assert "lm_head.weight" in read_tensors(tmp_path / "out")
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False


def test_mixtrals_sliding_window_is_nulled_aloud(tmp_path, capsys):
    """The published chat model's window would cut off what CLEX adds."""
    source = copy_golden("clex_mixtral", tmp_path)
    config = read_config(source)
    config["sliding_window"] = 32768
    (source / "config.json").write_text(json.dumps(config))

    convert(source, tmp_path / "out")

    assert "sliding_window 32768 is set to null" in capsys.readouterr().err
    assert read_config(tmp_path / "out")["sliding_window"] is None


def test_mixed_storages_come_out_in_the_configs_type(tmp_path):
    """An older revision of CLEX-7B-16K mixes float32 and bfloat16 in its .bin shards."""
    source = copy_golden("clex_llama", tmp_path)
    shard = source / "pytorch_model-00001-of-00002.bin"
    state = torch.load(shard, weights_only=True)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].float()
    torch.save(state, shard, _use_new_zipfile_serialization=False)  # and the old file format

    convert(source, tmp_path / "out")

    tensors = read_tensors(tmp_path / "out")
    assert {v.dtype for k, v in tensors.items() if "scaling" not in k} == {mx.bfloat16}
    assert mx.array_equal(
        tensors["model.embed_tokens.weight"],
        read_tensors(GOLDEN / "clex_llama")["model.embed_tokens.weight"],
    )


def test_a_dry_run_tells_everything_and_writes_nothing(tmp_path, capsys):
    """--dry-run must print what a conversion writes, and write nothing."""
    convert(GOLDEN / "clex_mixtral", tmp_path / "out", dry_run=True)

    text = capsys.readouterr().out
    assert "model-00001-of-00002.safetensors: 22 tensors" in text
    assert "model.clex_layer.proj_func.ode_up_proj -> scaling.up_proj" in text
    assert "switch_mlp.down_proj.weight" in text
    assert "drop\n  model.clex_layer.inv_freq\n" in text
    assert "write " in text
    assert list(tmp_path.iterdir()) == []


def test_the_card_has_the_table_of_scales_and_the_reach(converted):
    """A reader of the hub page must see the reach of the model."""
    card = (converted("clex_llama") / "README.md").read_text()

    assert "Reach: 256 tokens" in card
    assert "| 33 to 64 | 2 |" in card
    assert card.startswith("---\nlibrary_name: mlx\n")


@pytest.mark.parametrize("name", ["clex", "gene", "dynamic", "yarn", "none"])
def test_the_table_of_scales_is_what_the_scaling_answers(name):
    """Both ends of a row must have its scale; the neighbouring lengths must have another."""
    scaling = build_scaling({"type": name}, dims=16, base=1e4, trained_length=1024)
    rows = scale_table(scaling)

    assert rows[0][0] == 1
    assert len(rows) <= 16
    for first, last, scale in rows:
        assert scaling.scale_at(first) == scaling.scale_at(last) == scale
    for _, last, scale in rows[:-1]:
        assert scaling.scale_at(last + 1) > scale


def test_a_conversion_prints_no_line_of_other_packages(tmp_path):
    """The check of the written tokenizer printed transformers' warning about rope_type clex."""
    command = [sys.executable, "-m", "mlx_clex", "convert", "--hf-path", GOLDEN / "clex_llama"]
    done = subprocess.run(
        [*map(str, command), "--mlx-path", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith(("[mlx_clex]", "Reading:", "Writing:")) for line in lines), lines
