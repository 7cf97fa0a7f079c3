"""The same text is the same tokens wherever it comes in, and begins with one BOS token."""

import argparse
import io
import json
from types import SimpleNamespace

import pytest
from mlx_lm.generate import setup_arg_parser
from mlx_lm.utils import load_tokenizer

from mlx_clex import cache_prompt
from mlx_clex.bundled import FOLDER
from mlx_clex.data.corpus import load_corpora
from mlx_clex.data.text import TextTokenizer, encode_text, read_text
from mlx_clex.errors import InputError
from mlx_clex.evaluation.corpus import corpus_of
from mlx_clex.serving.prompt import encode_prompt, prompt_text

TEXT = "The quick brown fox\njumps over\n\nthe lazy dog.\n"
BOM, CRLF = b"\xef\xbb\xbf", TEXT.replace("\n", "\r\n").encode()
FORMS = {"LF": TEXT.encode(), "CRLF": CRLF, "BOM": BOM + TEXT.encode(), "both": BOM + CRLF}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folders(converted, tmp_path_factory):
    """The golden tokenizer, which adds a BOS token, and one that adds none."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for adds in (True, False):
        made[adds] = folder / str(adds)
        made[adds].mkdir()
        for file in converted("clex_llama").glob("*token*"):
            (made[adds] / file.name).write_bytes(file.read_bytes())
        path = made[adds] / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"add_bos_token": adds}
        path.write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return made


@pytest.fixture(params=[True, False], ids=["adds BOS", "adds none"])
def tokenizer(request, folders):
    return load_tokenizer(folders[request.param])


def by_prompt(tokenizer, *options):
    parser = setup_arg_parser()
    parser.add_argument("--prompt-file", default=None)
    parser.set_defaults(prompt=None)
    args = parser.parse_args(["--ignore-chat-template", *map(str, options)])
    return encode_prompt(args, tokenizer, continues=False)


def by_cache_prompt(tokenizer, file):
    text = prompt_text(argparse.Namespace(prompt=None, prompt_file=str(file), model=None))
    return cache_prompt._encode(tokenizer, text, templated=False)


def by_training(tokenizer, file, cache):
    options = {"mask_prompt": False, "cache_dir": cache, "splits": ["train"]}
    return load_corpora(file, tokenizer, **options)["train"].tokens.tolist()[:-1]  # without EOS


def by_perplexity(tokenizer, file, cache):
    return corpus_of(str(file), "train", tokenizer).tokens.tolist()[:-1]


@pytest.mark.parametrize("form", FORMS)
def test_every_entrance_gives_the_same_tokens(form, tokenizer, tmp_path, monkeypatch):
    """A text with a byte order mark was trained on with it, and read without it."""
    monkeypatch.setattr("mlx_clex.evaluation.corpus.DEFAULT_CACHE", tmp_path / "perplexity")
    wanted = by_prompt(tokenizer, "--prompt", TEXT)
    assert wanted == tokenizer.encode(TEXT)
    file, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    file.write_bytes(FORMS[form])
    row = json.dumps({"text": FORMS[form].decode()}).encode()
    rows.write_bytes(row.join([BOM, b"\r\n"]) if form == "both" else row + b"\n")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(FORMS[form])))
    found = {
        "stdin": by_prompt(tokenizer, "--prompt", "-"),
        "--prompt-file": by_prompt(tokenizer, "--prompt-file", file),
        "cache_prompt": by_cache_prompt(tokenizer, file),
        "lora, a text": by_training(tokenizer, file, tmp_path / "a"),
        "lora, a row": by_training(tokenizer, rows, tmp_path / "b"),
        "perplexity": by_perplexity(tokenizer, file, tmp_path),
    }
    assert {name for name, tokens in found.items() if tokens != wanted} == set()
    assert read_text(file) == TEXT  # chat, web


@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_data_have_one_bos_token(count, tokenizer, tmp_path):
    """A row that began with the BOS text had two, where the tokenizer or template adds one."""
    bos, at = tokenizer.bos_token, tokenizer.bos_token_id
    plain = by_prompt(tokenizer, "--prompt", "A cat.")
    bare = [token for token in plain if token != at]
    (tmp_path / "a.txt").write_text(bos * count + "A cat.")
    assert by_training(tokenizer, tmp_path / "a.txt", tmp_path) == [at, *bare]
    assert by_prompt(tokenizer, "--prompt", bos * count + "A cat.") == [at, *bare]
    for name, row in {
        "text": {"text": bos * count + "A cat."},
        "chat": {"messages": [{"role": "user", "content": bos * count + "A cat."}]},
        "pair": {"prompt": bos * count + "A cat.", "completion": bos + "And a dog."},
    }.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row))
        tokens = by_training(tokenizer, file, tmp_path)
        assert (tokens[0], tokens.count(at)) == (at, 1), name


def test_a_conversation_is_passed_on_as_it_is_otherwise():
    """Tool calls have no text, and other keys stay."""
    seen = []
    inner = SimpleNamespace(
        bos_token="<s>",  # noqa: S106 - no password
        apply_chat_template=lambda messages, **_: seen.extend(messages),
    )
    messages = [{"role": "user", "content": "<s>a\r\n", "name": "x"}, {"role": "tool"}, "odd"]
    TextTokenizer(inner).apply_chat_template(messages)
    assert seen == [{"role": "user", "content": "a\n", "name": "x"}, {"role": "tool"}, "odd"]


def test_rows_without_a_text_are_told_with_their_place(tokenizer, tmp_path, capsys):
    """An empty row ended the run with IndexError, or was a text of two special tokens."""
    file = tmp_path / "rows.jsonl"
    rows = ['{"text": "A cat."}', '{"text": ""}', "", '{"text": " \\n"}', '{"text": "A dog."}']
    file.write_text("\n".join(rows))
    options = {"mask_prompt": False, "cache_dir": tmp_path, "splits": ["train"]}
    for _ in "12":  # also where the tokens are those of an earlier run
        corpus = load_corpora(file, tokenizer, **options)["train"]
        assert len(corpus.starts) == 2
        told = capsys.readouterr().err
        assert f"Left out, for want of a text: {file}, line 2; {file}, line 4." in told


def test_half_of_a_surrogate_pair_is_one_line(tokenizer):
    """A prompt or a row with it ended in a TypeError of tokenizers, which did not say so."""
    with pytest.raises(InputError, match=r"half of a surrogate pair, '\\ud800'"):
        encode_text(tokenizer, "a \ud800", begins=True)


@pytest.mark.parametrize("before", ["\n", "</s>"])
@pytest.mark.parametrize("text", ["What?", "\nWhat?", " What?", "</s>\nWhat?"])
def test_a_text_behind_another_has_no_space_of_its_own(tokenizer, before, text):
    """The golden tokenizer puts one before each text; that of the bundled models joins lines."""
    for each in (tokenizer, load_tokenizer(FOLDER / "base")):
        known = each.encode(before, add_special_tokens=False)
        tokens = known + encode_text(each, text, begins=False, behind=before)
        assert each.decode(tokens).lstrip(" ") == before + text
