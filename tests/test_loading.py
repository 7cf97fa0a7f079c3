"""load: converted folders, published ones on the fly, stock ones, and what is refused."""

import concurrent.futures
import json
import shutil
import sys
import warnings

import mlx.core as mx
import pytest
from mlx_lm import load as stock_load

from mlx_clex import load
from mlx_clex.diagnosis.source import find_source
from mlx_clex.errors import InputError
from mlx_clex.model.scaled_model import ScaledModel

from .conftest import GOLDEN, random_adapters, stock_folder


@pytest.fixture
def folder(converted, tmp_path):
    """A converted checkpoint that a test may damage."""
    return shutil.copytree(converted("clex_llama"), tmp_path / "model")


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def test_a_published_folder_is_converted_once(tmp_path, capsys):
    """The second load takes the conversion of the first; a changed source makes a new one."""
    source = shutil.copytree(GOLDEN / "clex_phi", tmp_path / "published")
    model, tokenizer = load(source, cache_dir=tmp_path / "cache")
    ids = mx.array([tokenizer.encode("hello there")])
    before = model(ids)
    assert "Converting" in capsys.readouterr().err
    again, _ = load(source, cache_dir=tmp_path / "cache")

    assert "Converting" not in capsys.readouterr().err
    assert mx.array_equal(again(ids), before)
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    load(source, cache_dir=tmp_path / "cache")
    assert "Converting" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_published_folder_that_cannot_be_used_leaves_nothing_in_the_cache(tmp_path):
    """It was "Wrote ...", stayed in the cache, and failed at every load from then on."""
    source = shutil.copytree(GOLDEN / "clex_phi", tmp_path / "published")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(InputError, match="published has no tokenizer that loads"):
        load(source, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("template", [5, True, {"default": 5}])
def test_a_chat_template_that_is_no_text_is_refused(folder, template):
    """A conversion copied it, and every later prompt failed."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(InputError, match=f"chat_template is ({template}|5), not a text"):
        load(folder)


def test_a_normalizer_that_blows_texts_up_is_refused(folder):
    """A prompt of two letters took 3.6 GB."""
    step = {"type": "Replace", "pattern": {"String": "i"}, "content": "ii"}
    path = folder / "tokenizer.json"
    entries = json.loads(path.read_text())
    for steps, allowed in ((9, True), (10, False)):
        entries["normalizer"] = {"type": "Sequence", "normalizers": [step] * steps}
        path.write_text(json.dumps(entries))
        if allowed:
            load(folder)
        else:
            with pytest.raises(InputError, match="can make a text 1,024 times as long"):
                load(folder)


def test_a_converted_folder_runs_under_stock_mlx_lm(folder):
    """The shim makes it a checkpoint for every program of mlx-lm, with the same answers."""
    ours, _ = load(folder)
    theirs, tokenizer = stock_load(str(folder), trust_remote_code=True)
    ids = mx.array([tokenizer.encode("hello there " * 10)])

    assert isinstance(theirs, ScaledModel)
    assert mx.array_equal(ours(ids), theirs(ids))
    with pytest.raises(ValueError, match="trust_remote_code"):
        stock_load(str(folder))


def test_our_load_runs_no_file_of_the_folder(folder, tmp_path, converted):
    """A converted folder from a stranger may have another text in its shim."""
    (folder / "mlx_clex_model.py").write_text("raise SystemExit('ran')\n")
    load(folder)
    foreign = stock_folder(tmp_path, converted("clex_llama"), model_file="other.py")
    (foreign / "other.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(InputError, match="trust_remote_code"):
        load(foreign)


def test_a_scale_can_be_fixed_at_load(folder):
    """The scale then holds for every length, and the caches are mlx-lm's."""
    model, _ = load(folder, scale=3.5)
    assert model.fixed_scale == 3.5
    assert model.scale_at(1) == model.scale_at(200) == 3.5
    with pytest.raises(InputError, match=r"1\.\.8"):
        load(folder, scale=9)


def test_a_stock_model_stays_stock(tmp_path, converted):
    """Without a rope_scaling there is nothing to attach, and no scale to set."""
    folder = stock_folder(tmp_path, converted("clex_llama"))
    model, _ = load(folder)
    assert not isinstance(model, ScaledModel)
    with pytest.raises(
        InputError, match="was not converted with mlx_clex, so --scale 2 has no effect"
    ):
        load(folder, scale=2)


@pytest.mark.parametrize(
    ("entry", "rope"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "YarnRoPE"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
            "DynamicNTKScalingRoPE",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            "Llama3RoPE",
        ),
    ],
)
def test_what_mlx_lm_scales_by_itself_is_left_to_it(tmp_path, converted, entry, rope):
    """Published yarn, linear and dynamic entries were taken over, without their other keys."""
    folder = stock_folder(tmp_path, converted("clex_llama"), **entry)
    model, _ = load(folder)

    assert not isinstance(model, ScaledModel)
    assert type(model.layers[0].self_attn.rope).__name__ == rope
    if "rope_parameters" in entry:
        assert model.layers[0].self_attn.rope.base == 500.0


def test_an_unknown_rope_type_is_refused(tmp_path, converted):
    """It names the type and what there is."""
    folder = stock_folder(tmp_path, converted("clex_llama"), rope_scaling={"type": "banana"})
    with pytest.raises(InputError, match=r"'banana'.*clex, gene"):
        load(folder)


def truncate(folder):
    path = next(folder.glob("model*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def drop_scaling(folder):
    path = next(folder.glob("model*.safetensors"))
    weights = mx.load(str(path))
    del weights["scaling.up_proj"]
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})


DAMAGE = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "no config.json"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "no weights"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "truncated weights": (truncate, "corrupt or truncated"),
    "garbage weights": (
        lambda f: next(f.glob("model*.safetensors")).write_bytes(b"\xff" * 100),
        "corrupt or truncated",
    ),
    "a tensor is missing": (drop_scaling, "scaling.up_proj"),
    "another param_factor": (
        lambda f: edit(f, rope_scaling={"type": "clex", "max_factor": 8, "param_factor": 2}),
        "scaling.",
    ),
    "unknown key": (
        lambda f: edit(f, rope_scaling={"type": "clex", "max_facter": 8}),
        "max_facter",
    ),
    "odd head": (lambda f: edit(f, head_dim=15), "even"),
    "unknown family": (lambda f: edit(f, model_type="banana"), "'banana'"),
    "a tokenizer without end": (
        lambda f: (f / "tokenizer.json").write_text("[" * 100_000),
        "tokenizer",
    ),
    "tokenizer settings no object": (
        lambda f: (f / "tokenizer_config.json").write_text("5"),
        "tokenizer",
    ),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("*token*")], "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(damage, folder):
    """The message names what is wrong."""
    do, words = DAMAGE[damage]
    do(folder)
    with pytest.raises(InputError) as error:
        load(folder)
    assert words in str(error.value), str(error.value)


def test_an_end_beyond_the_vocabulary_is_ignored(folder, capsys):
    """transformers' default for Phi-3, 32000, stopped every small Phi-3 from loading."""
    _, before = load(folder)
    edit(folder, eos_token_id=[512, 7])
    _, tokenizer = load(folder)
    assert 7 in tokenizer.eos_token_ids
    assert 512 not in tokenizer.eos_token_ids
    assert "eos_token_id 512 is beyond vocab_size (512)" in capsys.readouterr().err
    edit(folder, eos_token_id=32_000)
    assert load(folder)[1].eos_token_ids == before.eos_token_ids


@pytest.mark.parametrize("rank", [10**9, 10**10])
def test_adapters_without_their_tensors_are_not_made_up(folder, tmp_path, rank):
    """A rank of 1e9 in adapter_config.json ended the process: the tensors took all memory."""
    adapters = random_adapters(folder, tmp_path / "adapters", seed=0)
    config = json.loads((adapters / "adapter_config.json").read_text())
    config["lora_parameters"]["rank"] = rank
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(adapters / "adapters.safetensors"), {})
    with pytest.raises(InputError, match=r"must have a rank within 1\.\.65536"):
        load(folder, adapter_path=adapters)


def change_adapters(adapters, change=lambda weights: weights, **settings):
    """Edit the tensors and the settings of adapters in place."""
    file = adapters / "adapters.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    mx.save_safetensors(str(file), change(weights))
    config = json.loads((adapters / "adapter_config.json").read_text()) | settings
    (adapters / "adapter_config.json").write_text(json.dumps(config))


BAD_ADAPTERS = {
    "no lora_b": (
        lambda w: {k: v for k, v in w.items() if not k.endswith("lora_b")},
        {},
        r"lacks .*lora_b, which its adapter_config.json asks for",
    ),
    "one lora_a missing": (
        lambda w: {k: v for k, v in w.items() if not k.endswith("layers.1.mlp.up_proj.lora_a")},
        {},
        r"lacks model.layers.1.mlp.up_proj.lora_a",
    ),
    "called dora": (lambda w: w, {"fine_tune_type": "dora"}, r"lacks .*\.m, which"),
    "called full": (lambda w: {}, {"fine_tune_type": "full"}, r"lacks model.layers.0"),
    "of another rank": (
        lambda w: w,
        {"lora_parameters": {"rank": 30_000, "scale": 4.0, "dropout": 0.0}},
        r"has rank 30000, but .* has the shape",
    ),
    "a scaling that is a list": (lambda w: w, {"rope_scaling": []}, "must be an object or null"),
    "an unknown type": (lambda w: w, {"fine_tune_type": "vera"}, "'vera'; there is: lora, dora"),
    "NaN": (lambda w: {k: v * float("nan") for k, v in w.items()}, {}, r"lora_. has values that"),
    "infinite": (
        lambda w: {k: v * (float("inf") if k.endswith("lora_b") else 1) for k, v in w.items()},
        {},
        r"lora_b has values that are not finite",
    ),
}


@pytest.mark.parametrize("fault", BAD_ADAPTERS)
def test_adapters_that_do_not_fit_their_settings_are_refused(fault, folder, tmp_path):
    """They loaded in part: logits were off by up to 5.6, with exit status 0."""
    change, settings, words = BAD_ADAPTERS[fault]
    adapters = random_adapters(folder, tmp_path / "adapters", seed=0)
    change_adapters(adapters, change, **settings)
    with pytest.raises(InputError, match=words):
        load(folder, adapter_path=adapters)


def change_tensor(folder, name, change):
    """Replace a tensor of a checkpoint."""
    path = next(folder.glob("model*.safetensors"))
    weights = mx.load(str(path))
    weights[name] = change(weights[name]).astype(weights[name].dtype)
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})


def with_one(value):
    return lambda w: mx.where(mx.arange(w.size).reshape(w.shape) == 5, value, w)


BAD_TENSORS = {
    "a NaN in a weight": (
        "model.layers.1.mlp.down_proj.weight",
        with_one(float("nan")),
        "model.layers.1.mlp.down_proj.weight has values that are not finite",
    ),
    "an infinity in a norm": (
        "model.norm.weight",
        with_one(float("inf")),
        "model.norm.weight has values that are not finite",
    ),
    "a token never asked for": (
        "model.embed_tokens.weight",
        lambda w: mx.concatenate([w[:-1], w[-1:] * float("nan")]),
        "model.embed_tokens.weight has values",
    ),
    "a weight times 1e30": (
        "model.layers.0.mlp.up_proj.weight",
        lambda w: w * 1e30,
        r"logits are all equal. Its largest weight is \d.*e\+\d\d, in model.layers.0.mlp.up_proj",
    ),
    "a NaN in the scaling": (
        "scaling.down_proj",
        with_one(float("nan")),
        "scaling.down_proj has values that are not finite",
    ),
    "a scaling times 1e4": (
        "scaling.down_proj",
        lambda w: w * 1e4,
        "of clex at scale [2-8] (is not finite|cannot be computed)",
    ),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_a_model_that_gives_no_numbers_is_refused(fault, folder):
    """generate printed <unk> and exited with 0, perplexity printed nan."""
    name, change, words = BAD_TENSORS[fault]
    change_tensor(folder, name, change)
    with pytest.raises(InputError, match=words):
        load(folder)


def test_a_stock_model_is_checked_too(tmp_path, converted):
    """A model without a scaling answers with the same nonsense."""
    folder = stock_folder(tmp_path, converted("clex_llama"))
    change_tensor(folder, "lm_head.weight", with_one(float("nan")))
    with pytest.raises(InputError, match=r"lm_head\.weight has values that are not finite"):
        load(folder)


def test_weights_of_signed_integers_are_refused(tmp_path, converted):
    """MLX computes with them, so a damaged header gave nonsense and exit status 0."""
    folder = stock_folder(tmp_path, converted("clex_llama"))
    path = next(folder.glob("model*.safetensors"))
    weights = mx.load(str(path))
    weights["lm_head.weight"] = (100 * weights["lm_head.weight"]).astype(mx.int32)
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    with pytest.raises(
        InputError, match=r"lm_head\.weight has the type int32\. Weights are floats"
    ):
        load(folder)


def test_large_sums_of_finite_weights_load(tmp_path, converted):
    """The sum of a float16 tensor may overflow though each of its values is fine."""
    folder = stock_folder(tmp_path, converted("clex_llama"))
    path = next(folder.glob("model*.safetensors"))
    weights = {name: w.astype(mx.float16) for name, w in mx.load(str(path)).items()}
    weights["lm_head.weight"] = weights["lm_head.weight"] + 50
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    assert not mx.isfinite(weights["lm_head.weight"].sum()).item()
    load(folder)


def test_suspicious_frequencies_are_told_at_load(folder):
    """A network that speeds pairs up produced garbage, and no line said so."""
    change_tensor(folder, "scaling.down_proj", lambda w: w * 0 + 0.2)
    with pytest.warns(UserWarning, match=r"pair 0 turns .*above pi it aliases"):
        load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, scale=1)  # scale 1 is as trained


def test_neither_a_folder_nor_an_id(tmp_path):
    """A misspelt path must not be looked up on the hub."""
    for name in (str(tmp_path / "nothing"), "./nothing", "a/b/c/d", ""):
        with pytest.raises(InputError, match="There is no folder or file"):
            load(name)
    with pytest.raises(InputError, match=r"no folder owner/model.* the hub did not answer"):
        load("owner/model-that-is-not-there", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["clex_llama", "clex_mixtral"])
def test_a_model_loaded_in_one_thread_runs_in_another(name, converted):
    """Servers do so, and MLX refuses lazy arrays of another thread's stream."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        model, _ = pool.submit(load, converted(name)).result()
    ids = mx.array([[1, 5, 9]])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        logits = pool.submit(lambda: mx.abs(model(ids)).max().item()).result()
    assert logits > 0


def test_a_folder_with_nothing_but_a_gguf_file_loads(tmp_path, monkeypatch):
    """Convert takes it, so load must."""
    seen = []
    module = sys.modules["mlx_clex.loading"]
    monkeypatch.setattr(module, "_converted", lambda source, target: seen.append(source))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("A model.")
    with pytest.raises(InputError):
        load(tmp_path)
    assert seen == [str(tmp_path)]
    with pytest.raises(InputError, match=r"model\.gguf"):  # not that there is no config.json
        find_source(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"has several .gguf files .*: give the path of one"):
        find_source(tmp_path)
