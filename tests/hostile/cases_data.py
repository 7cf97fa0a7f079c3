"""Hostile results, YAML files, data sets, texts, cards, and links, pipes and names of folders."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .case import (
    ALL,
    BOTH,
    FINE,
    REFUSED,
    Case,
    config,
    deep,
    linked,
    made_folder,
    piped,
    put,
    sparse,
)

_NAN = float("nan")
_FILE = "results.json"


def _rows(**changes: Any) -> Callable[[Path], None]:
    """Return an edit of the first row of the results; `...` deletes a column."""

    def edit(folder: Path) -> None:
        whole = json.loads((folder / _FILE).read_text())
        row = whole["rows"][0]
        for name, value in changes.items():
            if value is ...:
                row.pop(name, None)
            else:
                row[name] = value
        (folder / _FILE).write_text(json.dumps(whole))

    return edit


def _results() -> Iterator[Case]:
    both = ("picture", "go-on")
    for name, edit in {
        "empty": put(_FILE, ""),
        "a list": put(_FILE, "[]"),
        "deep": put(_FILE, deep()),
        "deep within": put(_FILE, '{"kind": "perplexity", "rows": ' + deep() + "}"),
        "no UTF-8": put(_FILE, b"\xff\xfe{}"),
        "a pipe": piped(_FILE),
        "a folder": made_folder(_FILE),
        "a link to zeros": linked(_FILE, "/dev/zero"),
        "300 MB": sparse(_FILE, 300 << 20, b"{"),
        "a kind of a list": config(_FILE, kind=[]),
        "another kind": config(_FILE, kind="compare"),
        "keys of numbers": config(_FILE, keys=[5]),
        "keys of lists": config(_FILE, keys=[["label"]]),
        "settings a list": config(_FILE, settings=[]),
        "rows an object": config(_FILE, rows={}),
        "rows of texts": config(_FILE, rows=["a"]),
        "a row of nothing": config(_FILE, rows=[{}]),
        "a key that no row has": config(_FILE, keys=["evil"]),
    }.items():
        yield Case("results", name, "results", edit, both)
    # What no row may have, and, of the columns that are drawn, what a figure may not be.
    nowhere: list[Any] = [[], {}, _NAN, float("inf")]
    for key in ("length", "perplexity", "low", "label", "windows", "nll"):
        drawn = {"label": [5, True, ...], "windows": [], "nll": []}.get(key, ["text", True, ...])
        for value in [*nowhere, *drawn]:
            shown = "gone" if value is ... else json.dumps(value)
            edit = _rows(**{key: value})
            yield Case("results", f"{key} {shown}", "results", edit, ("picture",))
    for key in ("length", "perplexity", "high"):
        for value in (-1, 1e308) if key == "high" else (-1, 0, 1e308):
            name = f"{key} {json.dumps(value)}"
            yield Case("results", name, "results", _rows(**{key: value}), ("picture",))
    for name, label in {"a surrogate": "\ud800", "escapes": "a\x1b[2J"}.items():
        edit = _rows(label=label)
        yield Case("results", f"a label of {name}", "results", edit, ("picture",))
    for name, label in {
        "mathematics": "$\\frac{",
        "lines": "a\nb",
        "10,000 characters": "x" * 10_000,
        "a path": "../../evil",
        "emoji": "\U0001f600",
    }.items():
        yield Case(
            "results", f"a label of {name}", "results", _rows(label=label), ("picture",), FINE
        )


_YAML_FILES: dict[str, Callable[[Path], object]] = {
    "python code": put("run.yaml", "!!python/object/apply:os.system ['touch canary']"),
    "python names": put("run.yaml", "model: !!python/name:os.system ''"),
    "python modules": put("run.yaml", "model: !!python/module:os"),
    "laughs": put(
        "run.yaml",
        "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n"
        + "".join(
            f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n"
            for p, n in zip("abcdefghij", "bcdefghijk", strict=True)
        ),
    ),
    "deep": put("run.yaml", "model: " + deep(20_000)),
    "deep blocks": put("run.yaml", "".join(" " * n + "- \n" for n in range(2000))),
    "tabs": put("run.yaml", "model:\n\t- a"),
    "empty": put("run.yaml", ""),
    "a list": put("run.yaml", "- a"),
    "a text": put("run.yaml", "hello"),
    "no UTF-8": put("run.yaml", b"model: \xff\xfe"),
    "zeros": put("run.yaml", b"\0" * 100),
    "two documents": put("run.yaml", "model: a\n---\nmodel: b\n"),
    "a key of a list": put("run.yaml", "? [a]\n: b\n"),
    "a key of a number": put("run.yaml", "5: a\n"),
    "an unknown key": put("run.yaml", "evil: 5\n"),
    "an unknown alias": put("run.yaml", "model: *evil\n"),
    "itself": put("run.yaml", "model: &a [*a]\n"),
    "a date": put("run.yaml", "model: 2020-01-01\n"),
    "a bad date": put("run.yaml", "model: 2020-99-99\n"),
    "5,000 digits": put("run.yaml", "seed: " + "9" * 5000 + "\n"),
    "a sexagesimal": put("run.yaml", "iters: 190:20:30\n"),
    "300 MB": sparse("run.yaml", 300 << 20, b"model: a\n#"),
    "a pipe": piped("run.yaml"),
    "a folder": made_folder("run.yaml"),
    "a link to zeros": linked("run.yaml", "/dev/zero"),
}
_YAML_VALUES: dict[str, list[str]] = {
    "model": ["5", "[a]", "{a: 1}", "true", "/etc", "''", '"a\\0b"'],
    "data": ["5", "[a]", "/etc/passwd", "/dev/zero", '"a\\0b"'],
    "adapter_path": ["5", "[a]", "/dev/null/x", '"a\\0b"'],
    "iters": ["-1", "0", "1.5", ".inf", ".nan", "ten", "true", "[1]"],
    "batch_size": ["0", "-1", "100000000", "1e30", "2.5", "true"],
    "max_seq_length": ["0", "-1", "100000000000", "text"],
    "learning_rate": [".inf", ".nan", "-1", "text", "[1]", "true", "1e400"],
    "num_layers": ["0", "-2", "text", "1.5", "[]"],
    "grad_accumulation_steps": ["0", "-1", "text"],
    "steps_per_report": ["0", "-1", "text", "{}"],
    "steps_per_eval": ["0", "-1", "text"],
    "save_every": ["0", "-1", "text"],
    "val_batches": ["-2", "text", "1.5"],
    "seed": ["-1", "1e30", "text", "18446744073709551616"],
    "optimizer": ["evil", "5", "[adam]", "os.system"],
    "optimizer_config": ["5", "[a]", "{adam: 5}", "{adam: {evil: 1}}", "{adam: {eps: text}}"],
    "lr_schedule": [
        "5",
        "{}",
        "{name: evil}",
        "{name: cosine_decay}",
        "{name: cosine_decay, arguments: [a]}",
    ],
    "lora_parameters": [
        "5",
        "[a]",
        "{}",
        "{rank: 0, scale: 1, dropout: 0}",
        "{rank: 100000000, scale: 1, dropout: 0}",
        "{rank: text, scale: 1, dropout: 0}",
        "{rank: 8, scale: .nan, dropout: 0}",
        "{rank: 8, scale: 1, dropout: 2}",
        "{rank: 8, scale: 1, dropout: 0, keys: [no.such]}",
        "{rank: 8, scale: 1, dropout: 0, keys: 5}",
        "{rank: 8, scale: 1, dropout: 0, evil: 5}",
        "{rank: true, scale: 1, dropout: 0}",
    ],
    "fine_tune_type": ["evil", "5", "[lora]"],
    "scaling": ["evil", "5", "[clex]"],
    "warmup": ["-1", "text"],
    "max_grad_norm": ["-1", "text", ".nan"],
    "eval_lengths": ["5", "[a]", "[0]", "[-1]", "[1.5]", "[100000000000]"],
    "hf_dataset": ["5", "{}", "[5]", "{path: 5}", "{path: [a]}"],
    "mask_prompt": ["5", "text"],
    "resume_adapter_file": ["5", "/etc/passwd", "/dev/zero"],
}


def whole_run(**values: str) -> Callable[[Path], None]:
    """Return an edit that writes a run of one step, with these values as they stand."""

    def edit(folder: Path) -> None:
        root = folder.parent.parent
        lines = {
            "model": f"{root}/bases/ours",
            "data": f"{root}/bases/data",
            "adapter_path": "written",
            "train": "true",
            "iters": "1",
            "batch_size": "1",
            "max_seq_length": "32",
            "num_layers": "1",
            "val_batches": "1",
            **values,
        }
        (folder / "run.yaml").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))

    return edit


def _yamls() -> Iterator[Case]:
    for name, edit in _YAML_FILES.items():
        yield Case("yaml", name, "", edit, ("yaml",))
    for key, values in _YAML_VALUES.items():
        for value in values:
            yield Case("yaml", f"{key}: {value[:50]}", "", whole_run(**{key: value}), ("yaml",))
    yield Case("yaml", "a whole run", "", whole_run(), ("yaml",), FINE)


_ROWS: dict[str, str | bytes] = {
    "no JSON": "hello\n",
    "a list": "[1]\n",
    "a number": "5\n",
    "null": "null\n",
    "deep": deep() + "\n",
    "deep within": '{"text": "a", "x": ' + deep() + "}\n",
    "a deep text": '{"text": ' + deep() + "}\n",
    "texts in a list": '{"text": ["a"]}\n',
    "a number for a text": '{"text": 5}\n',
    "null for a text": '{"text": null}\n',
    "an object for a text": '{"text": {"a": 1}}\n',
    "no known key": '{"evil": "a"}\n',
    "an empty text": '{"text": ""}\n',
    "messages a text": '{"messages": "hi"}\n',
    "messages of texts": '{"messages": ["hi"]}\n',
    "no messages": '{"messages": []}\n',
    "a role of numbers": '{"messages": [{"role": 5, "content": "hi"}]}\n',
    "a content of numbers": '{"messages": [{"role": "user", "content": 5}]}\n',
    "a prompt alone": '{"prompt": "hi"}\n',
    "a prompt of numbers": '{"prompt": 5, "completion": 6}\n',
    "a surrogate": '{"text": "\\ud800 and more text here, and more"}\n',
    "no UTF-8": b'{"text": "\xff\xfe"}\n',
    "UTF-16": '{"text": "hi"}\n'.encode("utf-16"),
    "zeros": b"\0" * 1000,
    "an empty file": "",
    "blank lines": "\n\n\n",
    "5,000 digits": '{"text": ' + "9" * 5000 + "}\n",
    "rows of several kinds": '{"text": "a"}\n{"prompt": "a", "completion": "b"}\n',
    "cut": '{"text": "hello',
}


def _data() -> Iterator[Case]:
    for name, text in _ROWS.items():
        yield Case("data", name, "data", put("train.jsonl", text), ("train",))
        yield Case("data", f"{name}, to measure", "data", put("train.jsonl", text), ("text",))
    for name, edit in {
        "a pipe": piped("train.jsonl"),
        "a folder": made_folder("train.jsonl"),
        "a link to zeros": linked("train.jsonl", "/dev/zero"),
        "a link out": linked("train.jsonl", "OUTSIDE/secret.txt"),
        "a link out to rows": linked("train.jsonl", "OUTSIDE/rows.jsonl"),
    }.items():
        yield Case("data", name, "data", edit, ("train", "text"))
    for name, edit in {
        "noise": put("prompt.txt", bytes(range(256)) * 10),
        # A pipe is allowed: the user names it, as in --prompt-file <(command).
        "UTF-16": put("prompt.txt", "hello".encode("utf-16")),
        "a folder": made_folder("prompt.txt"),
        "a link to zeros": linked("prompt.txt", "/dev/zero"),
        "60 MB": sparse("prompt.txt", 60 << 20),
        "beyond the reach": put("prompt.txt", "hello " * 20_000),
    }.items():
        yield Case("prompt file", name, "", edit, ("prompt", "fill-cache"))


def _links() -> Iterator[Case]:
    for name in ("generation_config.json", "README.md", "added_tokens.json", "vocab.json"):
        edit = linked(name, "OUTSIDE/secret.json")
        yield Case("link", f"{name} leads out", "ours", edit)
        status = REFUSED if name.endswith(".json") else FINE  # nothing opens the others
        yield Case("link", f"{name} is a pipe", "ours", piped(name), BOTH, status)
    for name, edit in {
        "a folder of itself": lambda f: (f / "again").symlink_to("."),
        "a socket's name": lambda f: (f / ".hidden").symlink_to("/etc/passwd"),
        "a folder named config.json.d": lambda f: (f / "config.json.d").mkdir(),
    }.items():
        yield Case("link", name, "ours", edit, ALL, FINE)
    edit = linked("more", "/etc")
    yield Case("link", "a folder out", "ours", edit, ALL)
    generation = "generation_config.json"
    for name, edit in {
        "no JSON": put(generation, "{"),
        "a list": put(generation, "[]"),
        "deep": put(generation, deep()),
        "an end of a text": put(generation, '{"eos_token_id": "a"}'),
    }.items():
        yield Case("generation settings", name, "ours", edit)
    # No text ends with it; a note says so.
    edit = put(generation, '{"eos_token_id": 100000}')
    name = "an end beyond the vocabulary"
    yield Case("generation settings", name, "ours", edit, BOTH, FINE)
    laughs = "a: &a [x, x]\n" + "".join(
        f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n"
        for p, n in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    for name, text in {
        "no YAML": "---\na: [\n---\n",
        "code": "---\nlicense: !!python/object/apply:os.system ['touch canary']\n---\n",
        "laughs": f"---\n{laughs}---\n",
        "a list": "---\n- a\n---\n",
        "deep": "---\nlicense: " + deep(20_000) + "\n---\n",
        "a licence of lines": '---\nlicense: "a\\nb\\x1b[2J"\n---\n',
        "a licence list": "---\nlicense: [a, b]\n---\n",
        "no UTF-8": "---\nlicense: \udcff\n---\n",
        "no end": "---\nlicense: mit\n",
    }.items():
        edit = put("README.md", text.encode("utf-8", "surrogateescape"))
        yield Case("card", name, "published", edit, ("convert",), FINE)


def cases() -> Iterator[Case]:
    """Yield the cases."""
    yield from _results()
    yield from _yamls()
    yield from _data()
    yield from _links()
