"""Adapters that the real PEFT wrote, and the same product merged by hand in other families."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_clex.checkpoint.adapters import add_adapters
from mlx_clex.checkpoint.fingerprint import fingerprint
from mlx_clex.errors import InputError
from mlx_clex.model_file import open_model

from ..make_peft_data import IDS, KINDS, SEEN, TARGET, base_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _no_compiler():
    """MLX's CPU kernels take a C++ compiler; these models are too small for that."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("peft") / "base")


def logits_of(folder, adapters=None, ids=IDS):
    model, _ = open_model(folder)
    if adapters is not None:
        add_adapters(model, adapters, None)
    return np.array(model(mx.array([ids]))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_those_of_peft(kind, base):
    """Only folders of mlx-lm were read, and PEFT's ended with KeyError: num_layers."""
    theirs = np.array(json.loads((TARGET / kind / "answers.json").read_text()))
    plain, ours = (logits_of(base, adapters)[:, list(SEEN)] for adapters in (None, TARGET / kind))
    assert np.abs(plain - theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < 2e-4


def changed(tmp_path, kind, change=lambda tensors: tensors, **settings):
    """A copy of PEFT's folder with other tensors and settings."""
    folder = shutil.copytree(TARGET / kind, tmp_path / "changed", copy_function=shutil.copyfile)
    config = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def without(part):
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


REFUSED = {
    "another method": ({"peft_type": "IA3"}, None, "peft_type 'IA3'; only LORA"),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, None, "= 'pissa'"),
    "layers that are repeated": ({"layer_replication": [[0, 2]]}, None, "layer_replication"),
    "tokens of their own": ({"trainable_token_indices": [1]}, None, "trainable_token_indices"),
    "a setting of the future": ({"use_later": True}, None, "use_later = True"),
    "another rank": ({"r": 3}, None, "says rank 3"),
    "no rank": ({"r": None}, None, "r = None. It must be a number"),
    "a rank of zero": ({"rank_pattern": {"q_proj": 0}}, None, "r = 0"),
    "a scale that is no number": ({"lora_alpha": "6"}, None, "lora_alpha = '6'"),
    "a pattern that never ends": ({"alpha_pattern": {"(.*)*x": 1}}, None, "patterns"),
    "no lora_B": ({}, without("0.self_attn.q_proj.lora_B"), "lacks lora_b of model.layers.0"),
    "a module of the settings gone": (
        {},
        without("1.mlp.down_proj"),
        "lacks model.layers.1.mlp.down_proj",
    ),
    "a target of no tensors": (
        {"target_modules": ["q_proj", "k_proj"]},
        None,
        "0.self_attn.k_proj",
    ),
    "a saved module gone": ({"modules_to_save": ["norm"]}, None, "lacks model.norm"),
    "no tensors": ({}, without("lora"), "has no lora_A"),
    "experts": ({}, renamed("mlp.", "mlp.experts.0."), "layers.0.mlp.experts.0.down_proj"),
    "two modules in one": ({}, renamed("layers.1", "language_model.layers.0"), "under that name"),
    "a bias of lora_B": ({}, renamed("q_proj.lora_B.weight", "q_proj.lora_B.bias"), "not read"),
    "another model": (
        {},
        lambda tensors: (
            {name: np.tile(t, (1, 2)) for name, t in tensors.items() if "A" in name}
            | {name: t for name, t in tensors.items() if "A" not in name}
        ),
        "which this model lacks",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_read_is_named(fault, base, tmp_path):
    """An adapter without one of its parts gives another model, so it must be refused."""
    settings, change, words = REFUSED[fault]
    folder = changed(tmp_path, "lora", change or (lambda tensors: tensors), **settings)
    with pytest.raises(InputError) as error:
        logits_of(base, folder)
    assert words in str(error.value), str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        ({"layers_to_transform": [0]}, "layers.1"),
        ({"layers_to_transform": 0}, "layers.1"),
        ({"exclude_modules": ["layers.1.mlp.down_proj"]}, "layers.1.mlp.down_proj"),
        ({"exclude_modules": ".*layers.1.*"}, "layers.1"),
        ({"target_modules": ".*_proj"}, "layers.1"),
        ({"target_modules": None}, "layers.1"),
        ({"target_modules": ["q_proj", "of_another_family"]}, "nothing"),
    ],
)
def test_a_module_that_was_not_trained_may_be_absent(base, tmp_path, settings, gone):
    """PEFT trains only some layers if it is told so."""
    assert logits_of(base, changed(tmp_path, "lora", without(gone), **settings)).size


def test_pickled_adapters_are_named(base, tmp_path):
    """Older versions of PEFT wrote adapter_model.bin."""
    folder = changed(tmp_path, "lora")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="Save the adapters with safe_serialization"):
        logits_of(base, folder)


def test_a_head_that_is_the_embedding_is_not_adapted_by_halves(base, tmp_path):
    """PEFT adapts the embedding alone; mlx-lm would adapt the head with it."""
    tied = shutil.copytree(base, tmp_path / "tied")
    tensors = load_file(tied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is the output head of this model too"):
        logits_of(tied, changed(tmp_path, "whole", without("lm_head")))


def test_a_quantised_base_takes_them(base, tmp_path):
    """Most people have the model in 4 bits; a tensor trained whole does not fit such a layer."""
    random = np.random.default_rng(1)
    model, _ = open_model(base)
    wide = nn.Linear(64, 32)
    model.layers[0].self_attn.q_proj = nn.QuantizedLinear.from_linear(wide, group_size=32)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (32, 2)))
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    folder = changed(tmp_path, "lora", lambda _: tensors, target_modules=["0.self_attn.q_proj"])
    x = mx.array(random.standard_normal((1, 64)).astype(np.float32))
    before = model.layers[0].self_attn.q_proj(x)
    add_adapters(model, folder, None)
    wanted = np.array(before) + 3.0 * np.array(x) @ a.T @ b.T
    assert np.abs(np.array(model.layers[0].self_attn.q_proj(x)) - wanted).max() < 1e-3
    assert isinstance(model.layers[0].self_attn.q_proj.linear, nn.QuantizedLinear)


def test_a_saved_answer_belongs_to_its_adapters(base, tmp_path):
    """A prompt cache made with one folder must not go on with another of the same tensors."""
    model, _ = open_model(base)
    marks = {
        fingerprint(model, base, folder)["adapter"]
        for folder in (
            None,
            TARGET / "lora",
            TARGET / "dora",
            changed(tmp_path, "lora", lora_alpha=7),
            changed(tmp_path / "b", "lora", lambda t: {n: 2 * a for n, a in t.items()}),
        )
    }
    assert len(marks) == 5


# Family -> modules that are adapted, by the names of transformers' model.
FAMILIES = {
    "llama": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "lm_head"],
    "gpt_neox": [
        "gpt_neox.layers.1.attention.query_key_value",
        "gpt_neox.layers.0.mlp.dense_4h_to_h",
    ],
    "phi3": ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"],
    "gemma2": ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"],
    "cohere": ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.k_proj"],
    "starcoder2": ["model.layers.0.mlp.c_fc", "model.layers.1.self_attn.o_proj"],
    "mixtral": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 128,
    **dict.fromkeys(("num_hidden_layers", "num_local_experts"), 2),
    "num_attention_heads": 4,
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_equal_weights_merged_in_the_file(family, tmp_path):
    """mlx-lm renames, turns and cuts the tensors of some families."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family)
    sizes = {key: value for key, value in SIZES.items() if hasattr(config, key)}
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    model.save_pretrained(plain)
    shutil.copytree(plain, merged)
    random = np.random.default_rng(0)
    adapters, weights = {}, load_file(plain / "model.safetensors")
    for module in FAMILIES[family]:
        weight = weights[f"{module}.weight"]
        rows, columns = weight.shape
        a, b = (random.standard_normal(shape) * 0.3 for shape in ((2, columns), (rows, 2)))
        weights[f"{module}.weight"] = weight + np.float32(2.0 * b @ a)
        for name, array in (("lora_A", a), ("lora_B", b)):
            adapters[f"base_model.model.{module}.{name}.weight"] = np.float32(array)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    settings = {"lora_alpha": 4, "target_modules": FAMILIES[family]}
    folder = changed(tmp_path, "lora", lambda _: adapters, **settings)
    base, ours, wanted = logits_of(plain), logits_of(plain, folder), logits_of(merged)
    assert np.abs(base - wanted).max() > 1e-2
    assert np.abs(ours - wanted).max() < 1e-4
