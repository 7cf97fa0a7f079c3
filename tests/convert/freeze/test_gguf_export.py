"""llama.cpp reads the exported file and gives the same answers as mlx_clex at that scale."""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import xllamacpp
from mlx_clex.convert import convert
from mlx_clex.convert.freeze import gguf_export
from mlx_clex.convert.read import gguf_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import mlx_clex
from mlx_clex.errors import InputError

from ...conftest import GOLDEN, stock_folder
from ...test_smollm2 import FILE, ROOT

SCALE = 4
TEXTS = ["The quick brown fox", "12345, 67", "wörds\n\nand ☃ snow", "I'm 'ere"]


class LlamaCpp:
    """llama.cpp's own server, in this process, in float32 throughout."""

    def __init__(self, file: Path) -> None:
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = 0, 1, 0
        options.cpuparams.n_threads = 1
        options.warmup, options.verbosity = False, -1
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(options)

    def log_probabilities(self, ids: list[int], vocabulary: int) -> np.ndarray:
        """Return the log probability of every token after these; NaN where it gives none."""
        step, *_ = self._complete(ids, n_predict=4, n_probs=vocabulary)["logprobs"]["content"]
        found = np.full(vocabulary, np.nan)
        for token in step["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def greedy(self, ids: list[int], count: int) -> list[int]:
        steps = self._complete(ids, n_predict=count, n_probs=1)["logprobs"]["content"]
        return [step["id"] for step in steps]

    def encode(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", body)  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            tokens: list[int] = json.load(answer)["tokens"]
        return tokens

    def _complete(self, ids: list[int], **options: Any) -> Any:
        answer = self.server.handle_completions(
            {"prompt": ids, "temperature": 0, "cache_prompt": False, "ignore_eos": True} | options
        )
        return (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]


def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        best: Any = mx.argmax(model(mx.array([ids]))[0, -1]).item()
        ids = [*ids, best]
    return ids[-count:]


def largest_difference(model: nn.Module, theirs: LlamaCpp, length: int) -> float:
    """Return the largest difference of log probabilities after random tokens."""
    vocabulary = model.args.vocab_size
    while True:
        ids = np.random.default_rng(length).integers(259, vocabulary, length).tolist()
        expected = np.array(nn.log_softmax(model(mx.array([ids]))[0, -1].astype(mx.float32)))
        if expected.argmax() > 258:  # llama.cpp gives none for an incomplete UTF-8 character
            break
        length -= 1
    difference: float = np.abs(theirs.log_probabilities(ids, vocabulary) - expected).max()
    return difference


CUTS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(gguf_export._LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def byte_level_folder(tmp_path: Path, cuts: list[pre_tokenizers.PreTokenizer]) -> Path:
    """A tiny LLaMA with a byte-level tokenizer that was trained on the licence."""
    folder = stock_folder(tmp_path, tmp_path, vocab_size=512)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (Path(__file__).parents[3] / "LICENSE").read_text()
    tokenizer.train_from_iterator([text, "in 1999, 2024 and 12345"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_cuts_text_as_our_tokenizer_does(tmp_path, name):
    """With a wrong tokenizer name llama.cpp makes other tokens, above all for numbers."""
    source = byte_level_folder(tmp_path, CUTS[name])
    entry = {"type": "ntk", "factor": 4}
    convert(source, tmp_path / "out", scaling=entry, freeze=4, freeze_for="llama.cpp")

    file = tmp_path / "out" / gguf_export.FILE
    metadata = gguf_file.read(file).metadata
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert len(metadata["tokenizer.ggml.tokens"]) == 512, "as many as rows of the embedding"
    theirs, ours = LlamaCpp(file), Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in [*TEXTS, " two  spaces", "in 1999,\n\n 2024"]:
        assert theirs.encode(text) == ours.encode(text).ids, text


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    """The refusal is one line, and no file is left behind."""
    llama, target = GOLDEN / "clex_llama", tmp_path / "out"
    chunks = byte_level_folder(tmp_path, [pre_tokenizers.Whitespace()])
    clex = {"type": "clex"}
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (GOLDEN / "clex_phi", {}, "this one is phi"),
        (GOLDEN / "gene_param_llama", {"freeze": 8}, "every head and layer"),
        (llama, {"quantize": True}, "leave out -q"),
        (chunks, {"scaling": clex}, "does not know llama.cpp's name for this tokenizer"),
    ]
    for source, options, words in cases:
        with pytest.raises(InputError, match=words):
            convert(source, target, **{"freeze": 4, "freeze_for": "llama.cpp"} | options)
    (chunks / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        convert(chunks, target, scaling=clex, freeze=4, freeze_for="llama.cpp")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"mlx-clex\[gguf\]"):
        convert(llama, target, freeze=4, freeze_for="llama.cpp")
    assert not target.exists()


def test_a_token_keeps_its_id_where_ids_are_left_out(tmp_path):
    """Every token after a gap got another's id: tokens were written in order, not by id."""
    source, target = byte_level_folder(tmp_path, CUTS["gpt-2"]), tmp_path / "out"
    file = source / "tokenizer.json"
    whole = json.loads(file.read_text())
    token = max(whole["model"]["vocab"], key=whole["model"]["vocab"].get)
    last = whole["model"]["vocab"][token]
    whole["model"]["vocab"][token] = last + 5
    file.write_text(json.dumps(whole))
    convert(source, target, scaling={"type": "ntk", "factor": 4}, freeze=4, freeze_for="llama.cpp")
    metadata = gguf_file.read(target / gguf_export.FILE).metadata
    assert metadata["tokenizer.ggml.tokens"][last + 5] == token
    assert metadata["tokenizer.ggml.tokens"][last] == f"[PAD{last}]"
    text = "in 1999, 2024 and 12345"
    ours = Tokenizer.from_file(str(file)).encode(text).ids
    assert LlamaCpp(target / gguf_export.FILE).encode(text) == ours


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens": ...},
        {"added_tokens": [{"id": 0}]},
        {"added_tokens": 5},
        {"model": ...},
        {"model": {"type": "BPE", "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": "1"}, "merges": []}},
        {"deep": "[" * 100_000 + "]" * 100_000},
    ],
)
def test_a_damaged_tokenizer_is_one_line_and_leaves_nothing(tmp_path, changes):
    """--for llama.cpp ended with a traceback: it read tokenizer.json by itself, unchecked."""
    source, target = byte_level_folder(tmp_path, CUTS["gpt-2"]), tmp_path / "out"
    file = source / "tokenizer.json"
    whole = {k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v is not ...}
    deep = whole.pop("deep", None)
    file.write_text(deep or json.dumps(whole))
    with pytest.raises(InputError, match="tokenizer"):
        convert(
            source, target, scaling={"type": "ntk", "factor": 4}, freeze=4, freeze_for="llama.cpp"
        )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["clex_llama", "clex_llama_gqa_log_scale", "gene_llama"])
def test_llama_cpp_gives_our_logits(tmp_path, name):
    """Rows of queries and keys, frequency factors and gain must follow llama.cpp's conventions."""
    convert(GOLDEN / name, tmp_path / "ours", dtype="float32")
    convert(tmp_path / "ours", tmp_path / "held", freeze=SCALE, dtype="float32")
    model, tokenizer = mlx_lm.load(str(tmp_path / "held"))
    # From the checkpoint as published, and from the converted one.
    for number, source in enumerate((GOLDEN / name, tmp_path / "ours")):
        target = tmp_path / str(number)
        convert(source, target, freeze=SCALE, freeze_for="llama.cpp", dtype="float32")
        assert sorted(file.name for file in target.iterdir()) == ["README.md", "model.gguf"]
    assert (tmp_path / "0" / "model.gguf").read_bytes()[1000:] == (
        target / "model.gguf"
    ).read_bytes()[1000:]

    theirs = LlamaCpp(target / "model.gguf")
    for text in TEXTS:
        assert theirs.encode(text) == tokenizer.encode(text), text
    for length in (16, 60, model.args.max_position_embeddings - 4):
        assert largest_difference(model, theirs, length) < 5e-5


def test_llama_cpp_says_the_same_of_a_real_model(tmp_path):
    """Past the trained length only the frozen frequencies give the right answer."""
    source = Path(os.environ.get("MLX_CLEX_SMOLLM2", ROOT / "build" / "smollm2" / FILE))
    if not source.is_file():
        pytest.skip(f"{FILE} is not there: run examples/fetch_smollm2.py build/smollm2")
    options: dict[str, Any] = {"scaling": {"type": "clex"}, "trained_length": 512}
    convert(source, tmp_path / "ours", dtype="float32", **options)
    options |= {"freeze": 2, "freeze_for": "llama.cpp"}
    convert(source, tmp_path / "frozen", dtype="float32", **options)
    model, tokenizer = mlx_clex.load(tmp_path / "ours", scale=2)
    theirs = LlamaCpp(tmp_path / "frozen" / gguf_export.FILE)

    ids = tokenizer.encode("The library was founded in 1874, by its first mayor. " * 50)[:600]
    expected = np.array(nn.log_softmax(model(mx.array([ids]))[0, -1]))
    assert np.abs(theirs.log_probabilities(ids, len(expected)) - expected).max() < 5e-4
    ids = tokenizer.encode("Gravity is")
    assert theirs.greedy(ids, 20) == greedy(model, ids, 20)
