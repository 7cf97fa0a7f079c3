"""Chat templates are programs of strangers: they must not take the machine."""

import time

import pytest

from mlx_clex import load
from mlx_clex.checkpoint import rendering
from mlx_clex.errors import InputError
from mlx_clex.serving.prompt import render_messages

MESSAGES = [{"role": "user", "content": "hello"}]
ECHO = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(converted):
    return load(converted("clex_phi"))[1]


def render(tokenizer, template, messages=MESSAGES, **options):
    tokenizer.chat_template = template
    return render_messages(tokenizer, messages, **options)


def test_text_is_that_of_transformers(tokenizer):
    """A template in another process must see what it sees in this one."""
    template = ECHO + "{% if add_generation_prompt %}{{ eos_token }}{{ mood }}{% endif %}"

    text = render(tokenizer, template, add_generation_prompt=True, mood="é\n")

    inner = tokenizer._tokenizer
    options = {"add_generation_prompt": True, "mood": "é\n"}
    assert text == inner.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert text == f"user: hello{tokenizer.eos_token}é\n"
    ids = tokenizer.apply_chat_template(MESSAGES, mood="x")
    assert ids == tokenizer.encode("user: hello", add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('not this') }}", "not this"),
        ("{{ 1/0 }}", "division by zero"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{% if %}", "Expected an expression"),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 'x' * 10**11 }}", "too much memory"),
        ("{{ 'x'|center(10**11) }}", "too much memory"),
        ("{{ ('a' * 100000)|replace('a', 'b' * 1000000) }}", "too much memory"),
        (
            "{% set n = namespace(x='xx') %}"
            "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "too much memory",
        ),
    ],
)
def test_a_template_that_fails_is_one_line(tokenizer, template, words):
    """13 of 18 such templates ended in a traceback, and one took 8.9 GB."""
    with pytest.raises(InputError, match="chat template does not take the messages") as caught:
        render(tokenizer, template)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert render(tokenizer, ECHO) == "user: hello"


def test_a_template_that_does_not_end_is_ended(tokenizer, monkeypatch):
    """A loop in a loop took a minute of every client."""
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    start = time.monotonic()

    with pytest.raises(InputError, match=r"it takes more than 0\.5 s"):
        render(tokenizer, loop)

    assert time.monotonic() - start < 5
    assert render(tokenizer, ECHO) == "user: hello"  # in a new process


def test_memory_is_watched_where_the_system_does_not_bound_it(tokenizer, monkeypatch):
    """macOS does not keep to RLIMIT_AS, so the parent looks at the process."""
    monkeypatch.setattr(rendering, "_memory_of", lambda pid: 1 << 40)
    rendering._process._base = 0
    slow = "{% for i in range(9999) %}{% for j in range(999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="too much memory"):
        render(tokenizer, slow)


def test_rendering_costs_little(tokenizer):
    """A server renders a template for each request."""
    render(tokenizer, ECHO)
    seconds = []
    for _ in range(21):
        start = time.perf_counter()
        render(tokenizer, ECHO)
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[10] < 0.01
