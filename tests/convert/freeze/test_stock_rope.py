"""A frozen checkpoint gives the same logits in stock programs as mlx_clex at that scale."""

import json
import shutil
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from mlx_clex.convert import convert
from mlx_clex.convert.freeze import stock_rope
from mlx_lm.utils import save_model

import mlx_clex
from mlx_clex.errors import InputError

from ...conftest import CONFIGS, GOLDEN
from ...tiny_families import config as tiny_config
from ...tiny_families import tiny

SCALE = 4
IDS = np.random.default_rng(0).integers(3, 500, (1, 120))
LLAMAS = ["clex_llama", "clex_llama_gqa_log_scale", "gene_llama"]


def unfrozen_logits(source: Path, tmp_path: Path, scale: float = SCALE, **options: Any) -> Any:
    """Return the logits of mlx_clex at the fixed scale, in float32."""
    convert(source, tmp_path / "unfrozen", dtype="float32", **options)
    model, _ = mlx_clex.load(tmp_path / "unfrozen", scale=scale)
    return np.array(model(mx.array(IDS)))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def family_folder(folder: Path, name: str, **changes: Any) -> Path:
    """Return a tiny random model of a family as mlx-lm saves one, with a tokenizer."""
    changes |= {"vocab_size": 512, "max_position_embeddings": 64}  # the golden tokenizer's size
    save_model(folder, tiny(name, **changes))
    (folder / "config.json").write_text(json.dumps(tiny_config(name, **changes)))
    for file in GOLDEN.glob("clex_llama/*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("name", LLAMAS)
def test_stock_mlx_lm_gives_our_logits(tmp_path, name):
    """A frozen folder must run without mlx_clex and without remote code."""
    convert(GOLDEN / name, tmp_path / "frozen", freeze=SCALE, dtype="float32")

    model, _ = mlx_lm.load(str(tmp_path / "frozen"))

    ours = unfrozen_logits(GOLDEN / name, tmp_path)
    assert np.abs(np.array(model(mx.array(IDS))) - ours).max() < 1e-4
    config = config_of(tmp_path / "frozen")
    assert "model_file" not in config
    assert (
        config["max_position_embeddings"]
        == SCALE * config_of(GOLDEN / name)["max_position_embeddings"]
    )
    assert not list((tmp_path / "frozen").glob("*.py"))


@pytest.mark.parametrize("name", [*LLAMAS, "clex_phi", "clex_mixtral"])
def test_stock_transformers_gives_our_logits(tmp_path, name):
    """transformers uses rope_scaling in every family, and its own tensor names."""
    frozen = tmp_path / "frozen"
    convert(GOLDEN / name, frozen, freeze=SCALE, freeze_for="transformers", dtype="float32")

    model = transformers.AutoModelForCausalLM.from_pretrained(frozen, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).logits.numpy()

    assert np.abs(theirs - unfrozen_logits(GOLDEN / name, tmp_path)).max() < 1e-4


def test_the_gain_of_the_scale_is_frozen_too(tmp_path):
    """log_gain at a fixed scale is log_scale at its longest text, which longrope has."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "clex_llama_gqa_log_scale", source)
    by_length = unfrozen_logits(source, tmp_path / "a")
    config = config_of(source)
    config["rope_scaling"] |= {"log_gain": True}
    (source / "config.json").write_text(json.dumps(config | {"log_scale": False}))
    by_scale = unfrozen_logits(source, tmp_path / "b")
    convert(source, tmp_path / "frozen", freeze=SCALE, dtype="float32")

    frozen, _ = mlx_lm.load(str(tmp_path / "frozen"))
    assert mx.abs(frozen(mx.array(IDS)) - mx.array(by_scale)).max() < 1e-4
    assert np.abs(by_scale - by_length).max() < 1e-5


def test_a_converted_folder_can_be_frozen_too(tmp_path):
    """The published checkpoint may be gone from the disk."""
    convert(GOLDEN / "clex_llama", tmp_path / "mlx")

    for program in ("mlx-lm", "transformers"):
        convert(tmp_path / "mlx", tmp_path / program, freeze=2, freeze_for=program)

    assert config_of(tmp_path / "mlx-lm")["rope_scaling"]["type"] == "longrope"


def test_frozen_and_quantised(tmp_path):
    """-q and --freeze for mlx-lm can be combined."""
    convert(GOLDEN / "clex_llama", tmp_path / "out", freeze=2, quantize=True)

    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert model(mx.array(IDS)).shape == (1, 120, 512)


EXPRESSED = {
    "linear": "linear",
    "ntk": None,
    "dynamic": None,
    "yarn": "yarn",
    "yarn-t": "yarn",
    "gene": "longrope",
    "clex": None,
}


@pytest.mark.parametrize("name", EXPRESSED)
def test_every_method_finds_its_simplest_words(tmp_path, name):
    """ntk, dynamic and fresh CLEX are another rope_theta, which every family reads."""
    source = tmp_path / "source"
    # yarn-t raises all of a query. Stock yarn raises what is rotated, a part of a head of Phi.
    shutil.copytree(GOLDEN / ("gene_param_llama" if name == "yarn-t" else "clex_phi"), source)
    loaded: Any = mx.load(str(source / "model.safetensors"))
    learned = ("clex_layer", "_coef")
    plain = {k: value for k, value in loaded.items() if not any(word in k for word in learned)}
    mx.save_safetensors(str(source / "model.safetensors"), plain)
    config = config_of(source) | {"rope_scaling": None}
    (source / "config.json").write_text(json.dumps(config))
    entry = {"type": name, **CONFIGS[name]}
    frozen = {"scaling": entry, "freeze": SCALE, "freeze_for": "transformers"}

    convert(source, tmp_path / "frozen", dtype="float32", **frozen)

    config = config_of(tmp_path / "frozen")
    assert (config.get("rope_scaling") or {}).get("type") == EXPRESSED[name]
    if EXPRESSED[name] is None:
        assert config["rope_theta"] > 10_000
        convert(source, tmp_path / "mlx", dtype="float32", scaling=entry, freeze=SCALE)
        model, _ = mlx_lm.load(str(tmp_path / "mlx"))
        theirs = np.array(model(mx.array(IDS)))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "frozen", dtype=torch.float32
        )
        with torch.no_grad():
            theirs = model(torch.tensor(IDS)).logits.numpy()
    ours = unfrozen_logits(source, tmp_path, scaling=entry)
    assert np.abs(theirs - ours).max() < 1e-4


@pytest.mark.parametrize("name", ["clex_phi", "clex_mixtral"])
def test_families_that_would_ignore_it_are_refused(tmp_path, name):
    """mlx-lm's Phi and Mixtral ignore rope_scaling silently."""
    with pytest.raises(InputError, match="ignores rope_scaling"):
        convert(GOLDEN / name, tmp_path / "frozen", freeze=SCALE)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", ["mlx-lm", "transformers"])
def test_what_no_stock_program_has_is_refused(tmp_path, program):
    """Stock programs have no frequencies per head and no gains per position."""
    with pytest.raises(InputError, match="every head and layer"):
        convert(GOLDEN / "gene_param_llama", tmp_path / "a", freeze=8, freeze_for=program)

    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gene_llama", source)
    config = config_of(source)
    config["rope_scaling"]["log_scale"] = True
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="every position its own gain"):
        convert(source, tmp_path / "a", freeze=8, freeze_for=program)


def test_converted_experts_cannot_go_back(tmp_path):
    """Mixtral's experts are one tensor in MLX; transformers has no such name."""
    convert(GOLDEN / "clex_mixtral", tmp_path / "mlx")

    with pytest.raises(InputError, match="Give the published checkpoint"):
        convert(tmp_path / "mlx", tmp_path / "out", freeze=2, freeze_for="transformers")


@pytest.mark.parametrize("scaling", [None, {"type": "ntk", **CONFIGS["ntk"]}])
def test_mlx_names_are_refused_without_learned_tensors_too(tmp_path, scaling):
    """Names were checked for CLEX only: ntk was written with MLX's names of experts."""
    source = family_folder(tmp_path / "source", "mixtral")
    given = convert(source, tmp_path / "given", scaling=scaling) if scaling else source
    freeze = {"freeze": 4, "freeze_for": "transformers"}
    freeze |= {} if scaling else {"scaling": {"type": "ntk", **CONFIGS["ntk"]}}

    with pytest.raises(InputError, match="Give the published checkpoint"):
        convert(given, tmp_path / "out", **freeze)


def test_mlx_shapes_are_refused(tmp_path):
    """mlx-lm transposes the convolutions of LFM2 and keeps their names."""
    source = family_folder(tmp_path / "source", "lfm2")
    scaling = {"type": "ntk", **CONFIGS["ntk"]}

    with pytest.raises(InputError, match=r"has no tensor .*conv.* Give the publ"):
        convert(source, tmp_path / "out", scaling=scaling, freeze=4, freeze_for="transformers")


@pytest.mark.parametrize("name", ["clex_llama", "gene_llama"])
@pytest.mark.parametrize("typed", [True, False])
def test_a_quantised_folder_goes_back_with_d(tmp_path, name, typed):
    """CLEX was refused for lm_head.scales; GeNE was written with scales and biases."""
    packed = convert(GOLDEN / name, tmp_path / "packed", quantize=True, q_group_size=32)
    if not typed:
        config = config_of(packed)
        config.pop("torch_dtype", None)
        (packed / "config.json").write_text(json.dumps(config))
    freeze = {"freeze": SCALE, "freeze_for": "transformers"}

    frozen = convert(packed, tmp_path / "frozen", dequantize=True, **freeze)

    unfrozen = convert(packed, tmp_path / "unfrozen", dequantize=True)
    theirs, ours = (mx.load(str(out / "model.safetensors")) for out in (frozen, unfrozen))
    assert theirs.keys() == {name for name in ours if not name.startswith("scaling.")}
    for tensor, array in theirs.items():
        assert array.dtype == ours[tensor].dtype
        assert mx.array_equal(array, ours[tensor]), tensor


def test_values_that_mlx_lm_changes_are_written_as_published(tmp_path):
    """Qwen3-Next's norms were written as w + 1, and its convolutions transposed."""
    source = family_folder(tmp_path / "source", "qwen3_next", num_hidden_layers=4)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    config = {k: v for k, v in config_of(source).items() if v is not None}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    model.save_pretrained(source)
    scaling = {"type": "ntk", **CONFIGS["ntk"]}
    freeze = {"freeze": SCALE, "freeze_for": "transformers"}

    frozen = convert(source, tmp_path / "frozen", dtype="float32", scaling=scaling, **freeze)

    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (source, frozen))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert mx.array_equal(array, after[name]), name


@pytest.mark.parametrize(
    ("tensor", "change", "words"),
    [
        ("up_proj", lambda w: w * np.nan, r"up_proj has values that are not finite"),
        ("down_proj", lambda w: mx.ones(w.shape) * 1e4, r"of clex at scale 4 cannot be computed"),
    ],
)
def test_weights_that_make_no_frequencies_are_not_frozen(
    tmp_path, converted, tensor, change, words
):
    """NaN passed for a perfect fit, so the folder was written as linear with factor 4."""
    source = shutil.copytree(converted("clex_llama"), tmp_path / "source")
    file = next(source.glob("model*.safetensors"))
    weights = mx.load(str(file))
    weights[f"scaling.{tensor}"] = change(weights[f"scaling.{tensor}"])
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})

    with pytest.raises(InputError, match=words):
        convert(source, tmp_path / "frozen", freeze=SCALE)
    assert not (tmp_path / "frozen").exists()


def test_a_stock_rope_that_gives_nan_is_no_fit():
    """Every comparison with NaN is false, and the largest of 0 and NaN was 0."""
    rotation = types.SimpleNamespace(queries=lambda x, at: x, keys=lambda x, at: x * np.nan)

    assert stock_rope._difference(rotation, rotation, 16, 64) == np.inf


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


@pytest.mark.parametrize("program", ["mlx-lm", "transformers", "llama.cpp"])
@pytest.mark.parametrize(
    ("name", "changes", "method"),
    [("llama", SLIDING, "gene"), ("llama", SLIDING, "ntk"), ("gpt_oss", {}, "ntk")],
)
def test_layers_that_are_not_scaled_are_not_frozen(tmp_path, name, changes, method, program):
    """Only layer 0 was compared, so windows were stretched too: logits were off by up to 0.75."""
    source = family_folder(tmp_path / "source", name, **changes)

    with pytest.raises(InputError, match="scales only layers with full attention"):
        convert(
            source,
            tmp_path / "frozen",
            scaling={"type": method, **CONFIGS[method]},
            freeze=SCALE,
            freeze_for=program,
        )
    assert not (tmp_path / "frozen").exists()


def check_frozen(source, tmp_path, scaling):
    """Hold the logits of stock mlx-lm on a frozen folder against ours at that scale."""
    convert(source, tmp_path / "frozen", dtype="float32", scaling=scaling, freeze=SCALE)

    model, _ = mlx_lm.load(str(tmp_path / "frozen"))
    ours = unfrozen_logits(source, tmp_path, scaling=scaling)
    assert np.abs(np.array(model(mx.array(IDS))) - ours).max() < 1e-4


def test_windows_with_their_own_rope_stay(tmp_path):
    """Gemma 3 takes the base of its windows from another key, so freezing it is exact."""
    source = family_folder(tmp_path / "source", "gemma3_text", sliding_window_pattern=2)
    scaling = {"type": "ntk", **CONFIGS["ntk"]}

    check_frozen(source, tmp_path, scaling)


def test_the_rope_may_be_in_any_layer(tmp_path):
    """LFM2 starts with a convolution: freezing it ended in a bare StopIteration."""
    source = family_folder(tmp_path / "source", "lfm2")
    ntk = {"type": "ntk", **CONFIGS["ntk"]}

    with pytest.raises(InputError, match="model for lfm2 ignores rope_scaling"):
        convert(source, tmp_path / "gene", scaling={"type": "gene"}, freeze=SCALE)
    check_frozen(source, tmp_path, ntk)


def test_a_config_that_a_family_does_not_run_is_no_fit(tmp_path):
    """gpt_oss builds longrope without a length, which ended in a TypeError of mlx-lm."""
    source = family_folder(tmp_path / "source", "gpt_oss")

    with pytest.raises(InputError, match="error of its nearest rope, linear, is"):
        convert(source, tmp_path / "frozen", scaling={"type": "gene"}, freeze=SCALE)
