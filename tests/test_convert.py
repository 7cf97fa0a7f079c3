"""What the converter writes: tensors, config, tokenizer, card."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import sentencepiece
import torch
from mlx_clex.convert import convert, output
from mlx_clex.convert.card import scale_table
from mlx_clex.convert.chat_templates import template_for
from mlx_clex.convert.pipeline import Source
from mlx_clex.convert.source import find

import mlx_clex
from mlx_clex.scaling import build_scaling

from .conftest import GOLDEN, GOLDEN_NAMES


def read_tensors(folder: Path) -> dict[str, Any]:
    """All weights of a folder, .bin shards too."""
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        loaded: Any = mx.load(str(file))
        tensors |= loaded
    for file in sorted(folder.glob("pytorch_model*.bin")):
        for name, tensor in torch.load(file, weights_only=True).items():
            tensors[name] = mx.array(tensor.float().numpy()).astype(mx.bfloat16)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_tensors_arrive_unchanged_under_our_names(converted, name):
    """Every weight of a published checkpoint must survive bit for bit, and no other."""
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


def _split_expert(key: str) -> tuple[str, str, tuple[int, str, str]]:
    prefix, rest = key.split(".experts.")
    index, part, leaf = rest.split(".")
    name = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[part]
    return prefix, rest, (int(index), name, leaf)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_converted_folder_holds_what_loaders_need_and_no_code_of_strangers(converted, name):
    """A modeling file copied along would be run by stock mlx-lm."""
    names = {file.name for file in (converted(name)).iterdir()}
    config = read_config(converted(name))

    assert {file for file in names if file.endswith(".py")} == {"mlx_clex_model.py"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert config["model_file"] == "mlx_clex_model.py"
    assert "auto_map" not in config
    assert config["rope_scaling"]["type"] in ("clex", "gene", "gene-param")
    assert config["rope_theta"] == read_config(GOLDEN / name)["rope_theta"]
    assert not list(converted(name).parent.glob("*.incomplete-*"))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_token_ids_equal_those_of_sentencepiece(converted, name):
    """transformers 5 alone loses BOS, the first space and the collapsing of spaces."""
    check_ids(GOLDEN / name / "tokenizer.model", converted(name))


def check_ids(model: Path, folder: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    _, tokenizer = mlx_clex.load(folder)
    texts = [
        "hello",
        " hello",
        "  two  spaces   and an end  ",
        "  a line  \n  that ends in spaces \n \n",
        "line\nbreak\n\n  indented\r\n\ttab",
        "naïve café ☕ 漢字 🙂 e\u0301 ﬁ ①",
        "",
        " ",
        "def f(x):\n    return x  # 12345",
    ]
    for text in texts:
        assert tokenizer.encode(text) == [1, *reference.encode(text)], repr(text)
    for text in texts[3:5]:
        ids = reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids), repr(text)


@pytest.mark.parametrize("config", [None, {"legacy": False}, {"legacy": True}])
def test_a_sentencepiece_model_of_llamas_kind_keeps_its_ids(tmp_path, config):
    """Llama's own tokenizer keeps repeated spaces; a folder may have no config for it."""
    source = copy_golden("clex_phi", tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink()
    if config:
        config["tokenizer_class"] = "LlamaTokenizer"
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    text = tmp_path / "text.txt"
    text.write_text("a few words of text\nwith  two  spaces and 123\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(source / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )

    convert(source, tmp_path / "out")

    check_ids(source / "tokenizer.model", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["add_bos_token"] is True
    assert written["model_max_length"] == 32 * 8


def copy_golden(name: str, tmp_path: Path) -> Path:
    target = tmp_path / name
    shutil.copytree(GOLDEN / name, target, ignore=shutil.ignore_patterns("golden.*"))
    return target


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
    }
    model, tokenizer = mlx_clex.load(tmp_path / "out")
    assert model.reach == tokenizer.model_max_length == 256


@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic", "yarn", "gene", "gene-param"])
def test_every_scaling_can_be_switched_on(base, tmp_path, name):
    """A scaling without an entry in the converter could not be used at all."""
    convert(base, tmp_path / "out", scaling={"type": name, "factor": 4})

    model, _ = mlx_clex.load(tmp_path / "out")
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 512)


def test_a_plain_checkpoint_stays_plain(base, tmp_path):
    """Without a scaling there is nothing for the shim to do."""
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
    """mlx-lm's LLaMA ties by default and would drop lm_head without a word."""
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
    """--dry-run must not differ from the real thing, nor leave a trace."""
    convert(GOLDEN / "clex_mixtral", tmp_path / "out", dry_run=True)

    text = capsys.readouterr().out
    assert "model-00001-of-00002.safetensors: 22 tensors" in text
    assert "model.clex_layer.proj_func.ode_up_proj -> scaling.up_proj" in text
    assert "switch_mlp.down_proj.weight" in text
    assert "drop\n  model.clex_layer.inv_freq\n" in text
    assert "write " in text
    assert list(tmp_path.iterdir()) == []


def test_the_card_has_the_table_of_scales_and_the_reach(converted):
    """A reader of the hub page must see how far the model goes."""
    card = (converted("clex_llama") / "README.md").read_text()

    assert "Reach: 256 tokens" in card
    assert "| 33 to 64 | 2 |" in card
    assert card.startswith("---\nlibrary_name: mlx\n")


@pytest.mark.parametrize("name", ["clex", "gene", "dynamic", "yarn", "none"])
def test_the_table_of_scales_is_what_the_scaling_answers(name):
    """Each row's ends must have the row's scale, its neighbours another one."""
    scaling = build_scaling({"type": name}, dims=16, base=1e4, trained_length=1024)
    rows = scale_table(scaling)

    assert rows[0][0] == 1
    assert len(rows) <= 16
    for first, last, scale in rows:
        assert scaling.scale_at(first) == scaling.scale_at(last) == scale
    for _, last, scale in rows[:-1]:
        assert scaling.scale_at(last + 1) > scale


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("CLEX-7B-Chat-16K", "<s>USER: Hi ASSISTANT: Ho</s>USER: Bye ASSISTANT:"),
        (
            "CLEX-Mixtral-8x7B-Chat-32k",
            "<s><|user|>\nHi</s>\n<|assistant|>\nHo</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        ),
        (
            "llama2-gene-64k-chat",
            "<s>user: Hi\n\nassistant: Ho</s>user: Bye\n\nassistant: ",
        ),
    ],
)
def test_published_chat_models_get_their_familys_format(tmp_path, folder, expected):
    """Their tokenizers bring no template; a wrong one makes a chat model babble."""
    shutil.copytree(GOLDEN / "clex_llama_gqa_log_scale", tmp_path / folder)
    convert(tmp_path / folder, tmp_path / "out")

    _, tokenizer = mlx_clex.load(tmp_path / "out")
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text == expected


def test_a_template_of_the_tokenizer_is_kept(tmp_path):
    """Ours is only for tokenizers without one."""
    source = copy_golden("clex_llama_gqa_log_scale", tmp_path / "CLEX-7B-Chat-16K")
    (source / "chat_template.jinja").write_text("theirs")

    convert(source, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "theirs"
    assert template_for("DAMO-NLP-SG/CLEX-7B-16K") is None


def test_shards_hold_every_tensor_once(tmp_path):
    """Large models are written in several files with an index."""
    tensors = {f"t{i}": mx.full((10, 10), i, dtype=mx.float32) for i in range(7)}
    output.write_weights(
        tmp_path, dict(tensors), shard_bytes=900, file_format="mlx", advance=lambda _: None
    )

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    read = read_tensors(tmp_path)
    assert read.keys() == tensors.keys()
    assert all(mx.array_equal(read[name], tensors[name]) for name in tensors)


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C in the middle of a shard."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_clex.convert.output.array_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(GOLDEN / "clex_llama", tmp_path / "new" / "out")

    assert list(tmp_path.iterdir()) == []


KILL_WHILE_WRITING = """
import os, signal, sys
from mlx_clex.convert import convert, output
output.array_bytes = lambda array: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2])
"""


def test_a_killed_conversion_leaves_nothing_that_looks_finished(tmp_path):
    """kill -9 cannot be cleaned up after, so what is left must tell what it is."""
    done = subprocess.run(
        [sys.executable, "-c", KILL_WHILE_WRITING, GOLDEN / "clex_phi", tmp_path / "out"],
        capture_output=True,
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.incomplete-")
    assert not (left / "config.json").exists()
    convert(GOLDEN / "clex_phi", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


MEASURE = """
import json, resource, sys, threading, time
from mlx_clex.convert import convert
import mlx_lm.utils, torch, transformers, tokenizers

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

peak = start = resident()
def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
print((peak - start) / 1e6)
"""


@pytest.fixture(params=["safetensors", "bin"])
def large(request, tmp_path):
    """A 240 MB checkpoint in shards of 80 MB."""
    folder = tmp_path / request.param
    folder.mkdir()
    config = read_config(GOLDEN / "clex_llama")
    config |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 8, "num_hidden_layers": 9, "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (1024, 1024)}
    shapes |= {"self_attn.v_proj": (1024, 1024), "self_attn.o_proj": (1024, 1024)}
    shapes |= {"mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024)}
    shapes |= {"mlp.down_proj": (1024, 3072), "input_layernorm": (1024,)}
    shapes |= {"post_attention_layernorm": (1024,)}
    for shard in range(3):
        names = {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(3 * shard, 3 * shard + 3)
            for name, shape in shapes.items()
        }
        if shard == 0:
            names |= {"model.embed_tokens.weight": (512, 1024), "lm_head.weight": (512, 1024)}
            names |= {"model.norm.weight": (1024,)}
            names |= {"model.clex_layer.proj_func.ode_up_proj": (64, 128)}
            names |= {"model.clex_layer.proj_func.ode_down_proj": (128, 64)}
        state = {
            name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in names.items()
        }
        if request.param == "bin":
            torch.save(state, folder / f"pytorch_model-{shard + 1:05d}-of-00003.bin")
        else:
            from safetensors.torch import save_file

            save_file(state, folder / f"model-{shard + 1:05d}-of-00003.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory on Linux")
def test_memory_is_that_of_a_shard_and_not_of_the_model(large, tmp_path):
    """A 14 GB checkpoint must convert on a Mac with 16 GB."""
    options = json.dumps({"quantize": large.name == "safetensors"})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, large, tmp_path / "out", options],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    used = float(done.stdout.split()[-1])
    shard = max(file.stat().st_size for file in large.iterdir()) / 1e6
    assert used <= 1.5 * shard + 100, f"{used:.0f} MB for shards of {shard:.0f} MB"


def test_headers_are_read_without_data():
    """A dry run of 90 GB must not read 90 GB."""
    source = Source(find(GOLDEN / "clex_llama_gqa_log_scale"))

    weights = source.weights()

    assert weights["model.norm.weight"].shape == (64,)
    assert np.isclose(sum(v.nbytes for v in weights.values()), 279_456, rtol=0.02)
