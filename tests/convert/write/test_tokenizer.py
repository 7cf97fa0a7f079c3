"""Tokenizers and chat templates of converted folders."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from mlx_clex.convert import convert
from transformers import AutoTokenizer

import mlx_clex
from mlx_clex.checkpoint.released_templates import template_for

from ...checkpoints import copy_golden
from ...conftest import GOLDEN, GOLDEN_NAMES, stock_folder


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
    """Their tokenizers have no template; a wrong template gives bad answers."""
    shutil.copytree(GOLDEN / "clex_llama_gqa_log_scale", tmp_path / folder)
    convert(tmp_path / folder, tmp_path / "out")

    _, tokenizer = mlx_clex.load(tmp_path / "out")
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text == expected


def test_a_template_of_the_tokenizer_is_kept(tmp_path):
    """The built-in templates are only for tokenizers without one."""
    source = copy_golden("clex_llama_gqa_log_scale", tmp_path / "CLEX-7B-Chat-16K")
    (source / "chat_template.jinja").write_text("theirs")

    convert(source, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "theirs"
    assert template_for("DAMO-NLP-SG/CLEX-7B-16K") is None


@pytest.mark.parametrize("special", [False, True])
def test_tokens_that_transformers_5_added_keep_their_ids(special, tmp_path):
    """It writes them into tokenizer.json alone, which was made anew from tokenizer.model."""
    source = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=520)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=special)
    tokenizer.save_pretrained(source)

    convert(source, tmp_path / "out")

    ids = mlx_clex.load(tmp_path / "out")[1].encode("<tool_call>user</tool_call> and")
    assert ids == mlx_clex.load(source)[1].encode("<tool_call>user</tool_call> and")
    assert {512, 513} <= set(ids)


def test_templates_with_a_name_are_copied(tmp_path):
    """transformers 5 keeps the template for tools in a folder of its own."""
    source = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    (source / "chat_template.jinja").write_text("plain")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].type }}")

    convert(source, tmp_path / "out")

    tokenizer = mlx_clex.load(tmp_path / "out")[1]
    messages, tools = [{"role": "user", "content": "hi"}], [{"type": "function"}]
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) == "function"
