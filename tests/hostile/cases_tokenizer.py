"""Hostile tokenizers and chat templates."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .case import (
    ALL,
    BOTH,
    FINE,
    REFUSED,
    Case,
    both,
    config,
    deep,
    gone,
    linked,
    made_folder,
    piped,
    put,
    sparse,
)

_CONFIG = "tokenizer_config.json"


def _json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return an edit that changes tokenizer.json."""

    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        entries = json.loads(path.read_text())
        changed = change(entries)
        path.write_text(json.dumps(entries if changed is None else changed))

    return edit


def _model(**changes: Any) -> Callable[[Path], None]:
    return _json(lambda entries: entries["model"].update(changes))


def _top(**changes: Any) -> Callable[[Path], None]:
    return _json(lambda entries: entries.update(changes))


def _token(number: Any, text: str = "<evil>") -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": True, **flags}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _files() -> Iterator[Case]:
    for name in ("tokenizer.json", _CONFIG, "special_tokens_map.json"):
        for word, edit in {
            "empty": put(name, ""),
            "noise": put(name, bytes(range(256)) * 10),
            "a list": put(name, "[]"),
            "null": put(name, "null"),
            "deep": put(name, deep()),
            "deep within": put(name, '{"a": ' + deep() + "}"),
            "a pipe": piped(name),
            "a folder": made_folder(name),
            "a link to zeros": linked(name, "/dev/zero"),
            "a link out": linked(name, "OUTSIDE/secret.json"),
            "300 MB": sparse(name, 300 << 20, b"{"),
        }.items():
            yield Case("tokenizer file", f"{name} {word}", "ours", edit)
    without = gone("tokenizer.json")
    for word, edit in {
        "empty": put("tokenizer.model", b""),
        "noise": put("tokenizer.model", bytes(range(256)) * 40),
        "cut": lambda f: (f / "tokenizer.model").write_bytes(
            (f / "tokenizer.model").read_bytes()[:3000]
        ),
        "a pipe": piped("tokenizer.model"),
        "a link to zeros": linked("tokenizer.model", "/dev/zero"),
        "a length of 2^63": put("tokenizer.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        "deep": put("tokenizer.model", b"\x0b" * 200_000),
        "gone": gone("tokenizer.model"),
    }.items():
        yield Case("sentencepiece", word, "ours", both(without, edit), ("generate",))
        status = FINE if word == "gone" else REFUSED  # there is a tokenizer.json
        yield Case("sentencepiece", f"published, {word}", "published", edit, ("convert",), status)


def _jsons() -> Iterator[Case]:
    for name, edit in {
        "no model": _top(model=None),
        "an unknown model": _model(type="Evil"),
        "an empty vocabulary": _model(vocab={}, merges=[]),
        "a vocabulary list": _model(vocab=[1, 2]),
        "negative ids": _model(vocab={"a": -1}, merges=[]),
        "ids of texts": _model(vocab={"a": "1"}, merges=[]),
        "ids beyond the model": _json(lambda e: e["model"]["vocab"].update(evil=100_000)),
        "ids beyond 32 bits": _json(lambda e: e["model"]["vocab"].update(evil=1 << 40)),
        "merges of unknown tokens": _model(merges=["zz qq"]),
        "merges of one part": _model(merges=["zz"]),
        "merges of numbers": _model(merges=[5]),
        "an unknown regex": _top(pre_tokenizer=_split("(((")),
        "an unknown pre-tokenizer": _top(pre_tokenizer={"type": "Evil"}),
        "an unknown normalizer": _top(normalizer={"type": "Evil"}),
        "an unknown decoder": _top(decoder={"type": "Evil"}),
        "an unknown post-processor": _top(post_processor={"type": "Evil"}),
        "added tokens a text": _top(added_tokens="x"),
        "an added id that is negative": _json(lambda e: e["added_tokens"].append(_token(-1))),
        "an added id of a text": _json(lambda e: e["added_tokens"].append(_token("1"))),
        "version 99": _top(version="99.0"),
        "a deep normalizer": _top(normalizer=_deep_sequence("normalizers", 5_000)),
    }.items():
        yield Case("tokenizer.json", name, "ours", edit)
    bomb = {"type": "Replace", "pattern": {"String": "i"}, "content": "i" * 20_000_000}
    edit = both(_top(normalizer=bomb))
    yield Case("tokenizer.json", "a normalizer that blows up", "ours", edit, ("generate",))
    loop = both(_top(pre_tokenizer=_split("(h|i|hi)*$x(h|i|hi)*y")))
    yield Case(
        "tokenizer.json", "a regex that backtracks", "ours", loop, ("generate",), FINE, changes=True
    )
    code = "import pathlib\npathlib.Path('canary').touch()\n"
    settings: dict[str, dict[str, Any]] = {
        "a class of os": {"tokenizer_class": "os.system"},
        "a class that is a number": {"tokenizer_class": 5},
        "a class list": {"tokenizer_class": ["a"]},
        "a length of a text": {"model_max_length": "long"},
        "an end that is a number": {"eos_token": 5},
        "an end that is a list": {"eos_token": ["</s>"]},
        "an end that is an object": {"eos_token": {"content": 5}},
        "extra tokens of numbers": {"extra_special_tokens": [5]},
        "additional tokens of numbers": {"additional_special_tokens": 5},
        "added tokens list": {"added_tokens_decoder": [1]},
        "added tokens of words": {"added_tokens_decoder": {"a": {"content": "x"}}},
        "an unknown tool parser": {"tool_parser_type": "../evil"},
    }
    # tokenizer.json is read in place of the class; special_tokens_map.json has the end.
    harmless = {"a class of os", *(name for name in settings if name.startswith("an end"))}
    for name, changes in settings.items():
        edit = config(_CONFIG, **changes)
        status = FINE if name in harmless else REFUSED
        # A conversion writes a length of its own.
        other = {"convert": FINE} if name == "a length of a text" else {}
        yield Case("tokenizer settings", name, "ours", edit, BOTH, status, other)
    for name, edit in {
        "code beside it": both(
            config(_CONFIG, auto_map={"AutoTokenizer": ["evil.Evil", None]}), put("evil.py", code)
        ),
        "code on the hub": config(_CONFIG, auto_map={"AutoTokenizer": ["a/b--evil.Evil", None]}),
        "a file outside": config(_CONFIG, tokenizer_file="/etc/passwd"),
        "a vocabulary outside": config(_CONFIG, vocab_file="/etc/passwd"),
        "a name on the hub": config(_CONFIG, name_or_path="someone/evil"),
        "a Mistral of the hub": config(transformers_version="4.50.0", model_type="llama"),
    }.items():
        yield Case("tokenizer code", name, "ours", edit, BOTH, FINE)
    edit = both(config(model_file="evil.py"), put("evil.py", code))
    yield Case("tokenizer code", "a model file", "ours", edit, ALL, FINE)
    edit = put("mlx_clex_model.py", code)
    yield Case("tokenizer code", "our model file replaced", "ours", edit, ALL, FINE)
    for name in ("sitecustomize.py", "mlx_lm.py", "json.py", "conftest.py"):
        yield Case("tokenizer code", f"{name} beside it", "ours", put(name, code), BOTH, FINE)


def _deep_sequence(key: str, depth: int) -> Any:
    value: Any = {"type": "NFC"}
    text = json.dumps(value)
    kind = {"normalizers": "Sequence"}[key]
    return json.loads(text) if depth == 0 else _Deep(kind, key, depth).value()


class _Deep:
    def __init__(self, kind: str, key: str, depth: int) -> None:
        self.kind, self.key, self.depth = kind, key, depth

    def value(self) -> Any:
        # Within the recursion limit of json.dumps; tokenizers' own is 128.
        value: Any = {"type": "NFC"}
        for _ in range(min(self.depth, 300)):
            value = {"type": self.kind, self.key: [value]}
        return value


TEMPLATES: dict[str, Any] = {
    "raises": "{{ raise_exception('no') }}",
    "raises lines": "{{ raise_exception('a\nb\n\x1b[2Jc') }}",
    "syntax": "{% for m in messages %}",
    "syntax within": "{{ messages | }}",
    "an unknown filter": "{{ messages | evil }}",
    "an unknown function": "{{ evil() }}",
    "undefined": "{{ evil.deep.er }}",
    "a division by zero": "{{ 1 / 0 }}",
    "a text and a number": "{{ 'a' + 5 }}",
    "an endless loop": "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2,
    "an endless generator": "{% for i in range(10**15) %}{% endfor %}",
    "10 GB": "{{ 'a' * 10**10 }}",
    "10 GB of lists": "{{ [0] * 10**9 }}",
    "a format of 10^9": "{{ '%1000000000d' % 1 }}",
    "a format method": "{{ '{:1000000000}'.format(1) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(40) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "10^10^10": "{{ 10**(10**10) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "a shift": "{{ (1).__lshift__(10**11) }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ ''|attr('__class__') }}",
    "format to attributes": "{{ '{0.__class__.__mro__}'.format('') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends 'evil' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep if": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nothing": "",
    "a surrogate": "{{ '\\ud800' }}",
    "changes messages": "{% set _ = messages.clear() %}",
    "a regex": "{{ 'a' | replace('a', 'b' * 10**9) }}",
    "wordwrap": "{{ ('a' * 10**6) | wordwrap(1) }}" * 50,
    "a join": "{{ range(99999) | map('string') | join('x' * 100000) }}",
    "sorted": "{{ [messages, 5] | sort }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "tojson": "{{ raise_exception | tojson }}",
    "strftime": "{{ strftime_now('%' * 10) }}",
    "debug": "{% debug %}{{ 1 // 0 }}",
}
# What changes the answer alone, not whether there is one; each must still be quick and small.
_ANSWERED = {"strftime"}


def _templates() -> Iterator[Case]:
    for name, template in TEMPLATES.items():
        edit = put("chat_template.jinja", template)
        status = FINE if name in _ANSWERED else REFUSED
        commands = ("generate", "chat")
        yield Case("template", name, "ours", edit, commands, status, {"chat": FINE}, changes=True)
    for name, value in {
        "a number": 5,
        "a list": [5],
        "a list without names": [{"template": "x"}],
        "an object": {"a": 1},
        "true": True,
        "a list of names": [{"name": "default", "template": 5}],
    }.items():
        edit = config(_CONFIG, chat_template=value)
        yield Case("template", f"that is {name}", "ours", edit)
    for name, edit in {
        "no UTF-8": put("chat_template.jinja", b"\xff\xfe"),
        "a pipe": piped("chat_template.jinja"),
        "a folder": made_folder("chat_template.jinja"),
        "a link out": linked("chat_template.jinja", "OUTSIDE/secret.txt"),
        "a link to zeros": linked("chat_template.jinja", "/dev/zero"),
        "300 MB": sparse("chat_template.jinja", 300 << 20),
    }.items():
        yield Case("template", f"file {name}", "ours", edit)


def cases() -> Iterator[Case]:
    """Yield the cases. Each that is converted is also converted for llama.cpp."""
    for case in (*_files(), *_jsons(), *_templates()):
        if "convert" in case.commands:
            # A .gguf file cannot lack a tokenizer, and gets its end from tokenizer_config.json.
            refused = case.name in ("published, gone", "an end that is a list")
            status = REFUSED if refused else case.expected("convert")
            expected = {**case.other, "freeze-gguf": status}
            commands = (*case.commands, "freeze-gguf")
            case = replace(case, commands=commands, other=expected)
        yield case
