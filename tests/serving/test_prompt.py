"""The same text gives the same tokens, wherever it comes from."""

import io
from types import SimpleNamespace

import pytest
from mlx_clex.convert import convert
from mlx_lm.generate import setup_arg_parser
from mlx_lm.utils import load_tokenizer

from mlx_clex.data.text import encode_text, read_text, without_bos
from mlx_clex.errors import InputError
from mlx_clex.serving.prompt import encode_prompt, pass_size

from ..conftest import GOLDEN

TEXT = "The quick brown fox\njumps over\n\nthe lazy dog.\n"
FORMS = {
    "LF": TEXT.encode(),
    "CRLF": TEXT.replace("\n", "\r\n").encode(),
    "CR": TEXT.replace("\n", "\r").encode(),
    "BOM": b"\xef\xbb\xbf" + TEXT.encode(),
    "BOM and CRLF": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16") / "m"
    return load_tokenizer(convert(GOLDEN / "clex_llama", folder))


@pytest.fixture
def templated(tokenizer):
    """The tokenizer with a chat template that renders the BOS text."""
    tokenizer._tokenizer.chat_template = TEMPLATE
    tokenizer.has_chat_template = True
    yield tokenizer
    tokenizer._tokenizer.chat_template = None
    tokenizer.has_chat_template = False


def tokens_of(tokenizer, *options, continues=False):
    parser = setup_arg_parser()
    parser.add_argument("--prompt-file", default=None)
    parser.set_defaults(prompt=None)
    args = parser.parse_args([*map(str, options)])
    return encode_prompt(args, tokenizer, continues=continues)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_tokens_from_a_file_from_stdin_and_as_an_option(
    tokenizer, tmp_path, monkeypatch, form
):
    """A file of Windows had tokens for its byte order mark, and stdin for its carriage returns."""
    wanted = tokens_of(tokenizer, "--prompt", TEXT)
    (tmp_path / "text.txt").write_bytes(FORMS[form])
    assert read_text(tmp_path / "text.txt") == TEXT
    assert tokens_of(tokenizer, "--prompt-file", tmp_path / "text.txt") == wanted
    for options in (("--prompt", "-"), ("--prompt-file", "-")):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(FORMS[form])))
        assert tokens_of(tokenizer, *options) == wanted
    assert tokens_of(tokenizer, "--prompt", FORMS[form].decode()) == wanted


@pytest.mark.parametrize("count", [1, 2])
def test_one_bos_token(tokenizer, count):
    """A prompt that began with the BOS text had two."""
    bos = tokenizer.bos_token
    wanted = tokens_of(tokenizer, "--prompt", "A cat.")
    assert tokens_of(tokenizer, "--prompt", bos * count + "A cat.") == wanted
    assert wanted.count(tokenizer.bos_token_id) == 1


def test_one_bos_token_of_a_chat_template(templated):
    """The template has the BOS text, and the message may begin with it too."""
    wanted = tokens_of(templated, "--prompt", "A cat.")
    assert tokens_of(templated, "--prompt", templated.bos_token + "A cat.") == wanted
    assert wanted.count(templated.bos_token_id) == 1
    system = [
        tokens_of(templated, "--prompt", "A", "--system-prompt", begin + "B")
        for begin in ("", templated.bos_token)
    ]
    assert system[0] == system[1]


def test_no_bos_token_behind_a_cache(tokenizer):
    """The cache begins with it."""
    text = tokenizer.bos_token + "A cat."
    wanted = tokens_of(tokenizer, "--prompt", "A cat.", continues=True)
    assert tokens_of(tokenizer, "--prompt", text, continues=True) == wanted
    assert tokenizer.bos_token_id not in wanted


def test_a_tokenizer_that_adds_no_bos_token():
    """The BOS token that the text asks for stays, once."""
    plain = SimpleNamespace(
        bos_token="<s>",  # noqa: S106 - no password
        bos_token_id=1,
        encode=lambda text, **_: [10 + ord(letter) for letter in text],
    )
    assert encode_text(plain, "<s><s>a", begins=True) == [1, 10 + ord("a")]
    assert encode_text(plain, "a", begins=True) == [10 + ord("a")]
    none = SimpleNamespace(bos_token=None, bos_token_id=None, encode=plain.encode)
    assert without_bos(none, "<s>a") == "<s>a"


@pytest.mark.parametrize("name", ["none", "nul\0", "folder", "bytes"])
def test_files_that_cannot_be_read(tmp_path, name):
    """Each is one line with the option and the path."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        InputError, match=r"^--prompt-file .*(cannot be read|is no UTF-8 text|is no path): "
    ):
        read_text(tmp_path / name, "--prompt-file ")


@pytest.mark.parametrize(
    ("total", "limit", "size"),
    [(10, 2048, 256), (4000, 2048, 500), (100_000, 2048, 2048), (9, 4, 4)],
)
def test_passes_of_reading(total, limit, size):
    """A text of one chunk moved the bar once, at its end."""
    assert pass_size(total, limit) == size
