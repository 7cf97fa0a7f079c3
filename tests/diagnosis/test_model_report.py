"""The report of doctor must be correct and must not load weights."""

import json
import re
import shutil

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mlx_clex import doctor
from mlx_clex.diagnosis.model_report import report
from mlx_clex.errors import InputError

from ..conftest import GOLDEN, GOLDEN_NAMES

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 64,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 4096,
    "query_pre_attn_scalar": 64,
}


def folder_of(tmp_path, config):
    """Return a model folder with a valid config, and weights that are a header alone."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    each = 100_000_000  # bytes of each of the tensors, which the disk does not store
    entry = {"dtype": "U8", "shape": [each]}
    ends = [[i * each, (i + 1) * each] for i in range(400)]
    header = {f"t{i}": entry | {"data_offsets": end} for i, end in enumerate(ends)}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + ends[-1][1])
    (tmp_path / "tokenizer.json").write_text("{}")
    return str(tmp_path)


def lines(path):
    """Return the texts of a report by name."""
    found: dict[str, list[str]] = {}
    for name, text in report(str(path)):
        found.setdefault(name, []).append(text)
    return found


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_published_format_is_described(name):
    """Family, reach and exports must be right before conversion."""
    found = lines(GOLDEN / name)
    assert "published checkpoint" in found["weights"][0]
    assert found["family"][0].startswith(name.split("_")[1].replace("param", "llama"))
    config = json.loads((GOLDEN / name / "config.json").read_text())
    assert found["trained length"] == [f"{config['max_position_embeddings']} tokens"]
    hard = "clex" in name
    assert found["reach"][0].endswith("texts are refused" if hard else "grows with the text")
    mlx, transformers, llama_cpp = found["export"]
    assert ("not for" in mlx) == (name in ("clex_mixtral", "clex_phi", "gene_param_llama"))
    assert ("not for" in transformers) == (name == "gene_param_llama")
    assert ("not for" in llama_cpp) == ("not for" in mlx)
    # Some of these random curves would deserve the warning in a trained model.
    problems = found.get("problem", [])
    assert len(problems) == (name in ("clex_llama", "clex_llama_gqa_log_scale", "gene_param_llama"))
    assert all("are suspicious" in problem for problem in problems)


def test_a_converted_folder_is_recognised(converted):
    """The report must say that mlx_clex has converted the folder."""
    assert "converted by mlx_clex" in lines(converted("clex_llama"))["weights"][0]


def test_seventy_billion_weights_are_not_initialised(tmp_path):
    """Initialised weights would need 140 GB."""
    before = mx.get_peak_memory()
    entry = {"type": "clex", "max_factor": 16}
    path = folder_of(
        tmp_path, LLAMA_70B | {"rope_scaling": entry, "model_file": "mlx_clex_model.py"}
    )
    found = lines(path)
    assert mx.get_peak_memory() - before < 100e6
    assert found["reach"] == ["65536 tokens; longer texts are refused"]
    # 80 layers, 8 heads, 128 dimensions, keys and values, 2 bytes.
    assert f"{80 * 8 * 128 * 2 * 65536 * 2 / 1e9:.2f} GB in 16 bits" in found["KV cache"][0]


def test_memory_equals_that_of_the_caches(tmp_path):
    """Window layers stop growing at their window; --kv-bits adds scales and biases."""
    found = lines(folder_of(tmp_path, GEMMA))
    a_token = 2 * 64  # keys and values of one head
    full, window = 4096 * a_token, 5 * 512 * a_token
    keys = mx.zeros((1, 1, 4096, 64), mx.bfloat16)
    cache = KVCache()
    cache.update_and_fetch(keys, keys)
    assert cache.nbytes == 2 * full
    quantised = cache.to_quantized(group_size=64, bits=4).nbytes
    text = found["KV cache"][0]
    assert f"{2 * (full + window) / 1e6:.2f} MB in 16 bits" in text
    assert f"{(quantised + 2 * window) / 1e6:.2f} MB with --kv-bits 4" in text
    assert "1 of 6 layers" in found["rope"][0]


def test_possible_scalings_of_a_stock_model_are_listed(tmp_path):
    """The report must also say why the others are not possible."""
    found = lines(folder_of(tmp_path, LLAMA_70B | {"num_hidden_layers": 2}))
    assert found["scaling"] == ["none"]
    assert found["possible"][0].endswith("none|linear|ntk|dynamic|yarn|yarn-t|clex|gene")
    assert found["not possible"][0].startswith("gene-param: ")
    assert "key heads" in found["not possible"][0]


def test_what_would_go_wrong(tmp_path):
    """Each in words, instead of a traceback at the first use."""
    yarn = {"type": "yarn", "factor": 4.0, "attention_factor": 1.0, "truncate": False}
    for config, words in [
        ({"rope_scaling": {"type": "clex", "max_facto": 3}}, "'max_facto'"),
        ({"rope_scaling": {"type": "spline"}}, "'spline'"),
        ({"rope_scaling": yarn}, "mlx-lm ignores attention_factor and truncate"),
        ({"model_type": "abacus"}, "abacus"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ]:
        found = lines(folder_of(tmp_path, LLAMA_70B | {"num_hidden_layers": 2} | config))
        assert any(words in problem for problem in found["problem"])
        assert not any("\n" in problem for problem in found["problem"])

    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN / "clex_llama_gqa_log_scale", folder)
    # An index that is left over from another format is not read.
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}')
    assert not any(".bin" in problem for problem in lines(folder)["problem"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    problems = lines(folder)["problem"]
    assert "lacks model-00002-of-00002.safetensors, which model.safetens" in problems[0]
    assert "No tokenizer" in problems[1]


def test_doctor_prints_the_report(capsys, tmp_path):
    """The report must be in the block for an issue; a missing model must be one line."""

    def run(*argv):
        return doctor.main(argv)

    assert run(str(GOLDEN / "clex_llama")) == 0
    out = capsys.readouterr().out
    assert out.startswith("```\nmlx-clex")
    assert "reach          256 tokens; longer texts are refused" in out
    # The summary of `plan`; a CPU reads 256 tokens of a model of 0.39 MB with 3 MB.
    assert re.search(r"^while reading  256 tokens: [23]\.\d+ MB \(.*weights 0\.39 MB", out, re.M)
    assert "fits           256 tokens fit as they are." in out
    assert run("/nowhere/at/all") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(InputError, match=r"config\.json"):
        report(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w * float("nan"), "scaling.down_proj has values that are not finite"),
        (lambda w: w * 0 + 0.2, "pair 0 turns"),
        (lambda w: w, "pair 5 is faster than pair 4"),
        (lambda w: w * 1e4, "of clex at scale"),
    ],
)
def test_a_learned_curve_that_cannot_be_right_is_a_problem(tmp_path, converted, change, words):
    """doctor said nothing of a scaling with NaN, or one that speeds pairs up."""
    folder = shutil.copytree(converted("clex_llama"), tmp_path / "model")
    (file,) = folder.glob("model*.safetensors")
    weights = mx.load(str(file))
    weights["scaling.down_proj"] = change(weights["scaling.down_proj"])
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})

    assert any(words in text for text in lines(folder)["problem"]), lines(folder)["problem"]
