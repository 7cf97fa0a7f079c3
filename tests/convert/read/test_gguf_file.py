"""Reading .gguf files: blocks, order of rows, config, tokenizer, damaged files."""

import contextlib
import json
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_clex.convert import convert
from mlx_clex.convert.read import gguf_file, gguf_tokenizer
from mlx_lm.utils import load_tokenizer

import mlx_clex
from mlx_clex.errors import InputError

from ...conftest import GOLDEN

HEADS, KEY_HEADS, HEAD_DIM, WIDTH, LAYERS = 4, 2, 16, 64, 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "self_attn.k_proj": (KEY_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KEY_HEADS * HEAD_DIM, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "mlp.gate_proj": (96, WIDTH),
    "mlp.up_proj": (96, WIDTH),
    "mlp.down_proj": (WIDTH, 96),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a query or key projection in llama.cpp's order."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def tiny(tmp_path):
    """Return a .gguf file and its weights."""
    return tiny_gguf(tmp_path)


def tiny_gguf(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a .gguf file of a tiny LLaMA with Q8_0 matrices; return it and its weights."""
    rng = np.random.default_rng(0)
    weights = {"model.embed_tokens": (256 + 4, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        weights |= {f"model.layers.{layer}.{name}": shape for name, shape in SHAPES.items()}
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    add_tokenizer(writer)
    expected: dict[str, np.ndarray] = {}
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32) / 8
        stored, kind = array, gguf.GGMLQuantizationType.F32
        if len(shape) > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
            stored = array
            if "q_proj" in name or "k_proj" in name:
                stored = permute(array, HEADS if "q_proj" in name else KEY_HEADS)
            stored = gguf.quants.quantize(stored, kind)
        expected[name + ".weight"] = array
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf", expected


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[name] + ".weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def add_tokenizer(writer: Any, more: int = 0) -> None:
    """Add a tokenizer: bytes, three special tokens, one merge, and more tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*("<a>", "<b>", "<c>"), *bytes_to_unicode().values(), "he"]
    tokens += [f"word{index}" for index in range(more)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (257 + more))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def test_weights_arrive_in_hugging_faces_order(tiny, tmp_path):
    """With llama.cpp's order of rows the model gives wrong answers in fluent text."""
    file, expected = tiny
    convert(file, tmp_path / "out", dtype="float32")

    tensors: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        half = array.astype(np.float16) if array.ndim > 1 else array
        assert np.array_equal(np.array(tensors[name]), half.astype(np.float32)), name


def test_a_gguf_file_becomes_a_model_with_its_tokenizer(tiny, tmp_path):
    """Settings, vocabulary, chat template and end token are all in the file."""
    file, _ = tiny
    convert(file, tmp_path / "out", scaling={"type": "clex", "max_factor": 4}, quantize=True)

    model, tokenizer = mlx_clex.load(tmp_path / "out")
    assert model.reach == tokenizer.model_max_length == 256
    assert model.args.rope_theta == 5000.0
    assert model.args.tie_word_embeddings
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.decode(tokenizer.encode("some wörds <c>")) == "some wörds <c>"
    assert tokenizer.encode("<c>") == [2]
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"tokens": ["a", "b", "c"], "token_type": [1, 3, 3]}, 1),
        ({"eot_token_id": 2}, [1, 2]),
        ({"eot_token_id": 1, "eom_token_id": 0}, [1, 0]),
        ({"tokens": ["a", "b", "<end_of_turn>"], "token_type": [1, 3, 3]}, [1, 2]),
        ({"tokens": ["a", "b", "<end_of_turn>"], "token_type": [1, 3, 1]}, 1),
    ],
)
def test_the_end_of_a_turn_ends_an_answer(metadata, expected):
    """Gemma's files end a text with another token than a turn, and answers did not stop."""
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}

    assert gguf_file._ends({"tokenizer.ggml.eos_token_id": 1, **named}) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floats_keep_their_type(dtype, tmp_path):
    """float32 lost 13 bits, and bfloat16 its small numbers."""
    scaling = {"type": "linear", "factor": 1.0}
    for_llama = {"dtype": dtype, "freeze": 1.0, "freeze_for": "llama.cpp"}
    convert("bundled:base", tmp_path / "file", scaling=scaling, **for_llama)

    convert(tmp_path / "file" / "model.gguf", tmp_path / "out")

    weights: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {array.dtype for array in weights.values()} == {getattr(mx, dtype)}


def test_a_sentencepiece_vocabulary_keeps_its_ids(tmp_path):
    """A .gguf file has pieces and scores, but no merges and no normaliser."""
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(GOLDEN / "clex_llama" / "tokenizer.model")
    )
    pieces = range(model.get_piece_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 1 for i in pieces]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in pieces],
        "tokenizer.ggml.scores": [model.get_score(i) for i in pieces],
        "tokenizer.ggml.token_type": [6 if model.is_byte(i) else kinds[i] for i in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }
    config = gguf_tokenizer.write(gguf_file.GgufFile(tmp_path, metadata, []), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    tokenizer = load_tokenizer(tmp_path)

    for text in ["hello", "  two  spaces ", "naïve 漢字 🙂\n x", ""]:
        assert tokenizer.encode(text) == [1, *model.encode(text)], repr(text)


FLOATS = ("F32", "F16", "BF16")
KINDS = [kind for kind in gguf.quants._type_traits if kind.name not in FLOATS]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_of_the_package_is_read(kind, monkeypatch):
    """Files of IQ and three-bit types were refused. Decoding row by row must not change them."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 256, (8, 4 * nbytes), np.uint8)
    # Scales of moderate size, wherever a block keeps them.
    raw.reshape(-1, nbytes)[:, [1, 3, nbytes - 1]] &= 0x3B
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, kind)
    monkeypatch.setattr(gguf_file, "_CHUNK", 3 * 4 * elements)

    with np.errstate(all="ignore"):
        assert np.array_equal(
            gguf_file.decode(raw, kind), theirs.astype(np.float16), equal_nan=True
        )


def test_a_file_that_grows_says_so(tiny, tmp_path, capsys):
    """A quantised file of 0.4 GB became 1.1 GB without advice on how to keep it small."""
    file, _ = tiny
    convert(file, tmp_path / "out")
    assert "The source has 8.6 bits per weight." in capsys.readouterr().err
    convert(file, tmp_path / "small", quantize=True, q_group_size=32)
    assert "The source has" not in capsys.readouterr().err


def test_without_the_package_the_extra_is_named(tiny, tmp_path, monkeypatch):
    """Reading .gguf files is an extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'mlx-clex\[gguf\]'"):
        convert(tiny[0], tmp_path / "out")


def test_damage_anywhere_is_one_line_and_cheap(tiny, tmp_path):
    """A count of 2^64 in the header would never end."""
    file, _ = tiny
    data = bytearray(file.read_bytes())
    draw = np.random.default_rng(0)
    tracemalloc.start()
    started = time.perf_counter()
    for _ in range(80):
        broken = bytearray(data)
        at = int(draw.integers(0, 6000))
        size = int(draw.choice([1, 4, 8]))
        broken[at : at + size] = draw.bytes(size) if draw.random() < 0.5 else b"\xff" * size
        file.write_bytes(broken)
        with contextlib.suppress(InputError):  # a changed name or number may also be readable
            gguf_file.config_of(gguf_file.read(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert time.perf_counter() - started < 120


@pytest.mark.parametrize("keep", [0, 3, 20, 500, 0.5, 0.99])
def test_a_cut_file_is_refused(tiny, tmp_path, keep):
    """An interrupted download leaves a cut file."""
    file, _ = tiny
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])

    with pytest.raises(InputError, match="corrupt or truncated"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "change", "part"),
    [
        ("mamba", lambda writer: None, "architecture 'mamba'"),
        ("llama", lambda writer: writer.add_expert_count(8), "mixture of experts"),
        ("llama", lambda writer: writer.add_rope_dimension_count(8), "part of a head"),
        ("llama", lambda writer: None, "no llama.feed_forward_length"),
    ],
)
def test_what_is_not_served_is_named(tmp_path, architecture, change, part):
    """A model that is read only in part would convert and give wrong answers."""
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_block_count(1)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    with pytest.raises(InputError, match=part):
        convert(tmp_path / "other.gguf", tmp_path / "out")


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), version=st.integers(0, 4), counts=st.integers(0, 2**64 - 1))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, version, counts):
    """A hostile header must not end in a traceback."""
    file = Path(tmp_path_factory.getbasetemp()) / "fuzz.gguf"
    head = b"GGUF" + version.to_bytes(4, "little") + counts.to_bytes(8, "little") * 2
    file.write_bytes(head + data)
    try:
        parsed = gguf_file.read(file)
    except InputError:
        return

    assert parsed.metadata == {}
