"""The parsers that `fuzz.py` tries, and what each is given."""

import argparse
import json
import os
import struct
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import strategies as st
from mlx_clex.convert.read import gguf_file, source, torch_bin

from mlx_clex import load
from mlx_clex.checkpoint import adapters, fingerprint, prompt_cache, safetensors_file
from mlx_clex.checkpoint.config import normalise_config
from mlx_clex.data import corpus
from mlx_clex.data.stop_strings import StopStrings
from mlx_clex.evaluation.results import read_results
from mlx_clex.model.scaled_model import make_prompt_cache
from mlx_clex.serving import prompt as prompts
from mlx_clex.serving import saved_conversation
from mlx_clex.serving.access import Access
from mlx_clex.serving.requests import read_request
from mlx_clex.training.log import read_log
from mlx_clex.training.option_fields import options_of, with_config
from mlx_clex.training.options import TrainingOptions

from ..serving.test_requests import CHATS, COMPLETIONS, DEFAULTS, SERVED
from .case import write_safetensors
from .cases_config import KEYS, SCALING_KEYS
from .cases_tokenizer import TEMPLATES
from .fuzz_folders import folder_targets
from .fuzz_inputs import BYTES, VALUES, Target, mutated, objects


def targets(folder: Path) -> Iterator[Target]:
    """Yield every parser.

    Args:
        folder: an empty one, for files.
    """
    file = folder / "input"
    model, tokenizer = load("bundled:clex")
    here = fingerprint.fingerprint(model, _BUNDLED)

    def of_file(parse: Callable[[Path], object], suffix: str = "") -> Callable[[bytes], object]:
        path = folder / f"input{suffix}"

        def run(data: bytes) -> object:
            path.write_bytes(data)
            return parse(path)

        return run

    def of_json(
        parse: Callable[[Path], object], name: str = "input.json"
    ) -> Callable[[Any], object]:
        path = folder / name

        def run(value: Any) -> object:
            path.write_text(json.dumps(value))
            return parse(path)

        return run

    whole_config = json.loads((_BUNDLED / "config.json").read_text())
    configs = st.one_of(
        objects(whole_config, KEYS),
        st.builds(
            lambda entry, kind: {**whole_config, "rope_scaling": {**entry, "type": kind}},
            st.dictionaries(st.sampled_from(SCALING_KEYS), VALUES, max_size=5),
            st.sampled_from(["clex", "yarn", "gene", "gene-param", "linear", "ntk", "dynamic"]),
        ),
        VALUES,
    )
    yield Target("config.json", configs, normalise_config, 18_000)

    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "__metadata__": {},
    }
    headers = st.one_of(
        st.builds(
            lambda entry, more: _safetensors({**header, "a": entry, **more}),
            objects(header["a"]),
            st.dictionaries(st.text(max_size=3), VALUES, max_size=2),
        ),
        mutated(_safetensors(header)),
        BYTES,
    )
    yield Target("safetensors header", headers, of_file(safetensors_file.read_header), 10_000)

    adapter_config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 2, "scale": 4.0, "dropout": 0.0},
    }
    (folder / "adapters").mkdir()
    write_safetensors(folder / "adapters" / "adapters.safetensors", {})
    parameters = objects(adapter_config["lora_parameters"], ("keys",))
    more = ("rope_scaling", "trained_length", "trained_scaling")
    adapter_configs = st.builds(
        lambda config, lora: {**config, "lora_parameters": lora},
        objects({k: v for k, v in adapter_config.items() if k != "lora_parameters"}, more),
        st.one_of(parameters, VALUES),
    )

    def add(value: Any) -> None:
        (folder / "adapters" / "adapter_config.json").write_text(json.dumps(value))
        fresh, _ = _lazy_model()
        adapters.add_adapters(fresh, folder / "adapters", None)

    yield Target("adapter_config.json", adapter_configs, add, 1_000)

    caches = make_prompt_cache(model)
    ids = tokenizer.encode("And it came to pass")
    import mlx.core as mx

    mx.eval(model(mx.array([ids]), cache=caches))
    talk = {"format": "2", "messages": [{"role": "user", "content": "a"}], "tokens": ids}
    talk |= {"cached": len(ids), "ended": False, "open": True, "asked": 0, "system_prompt": None}
    saved = folder / "cache.safetensors"
    prompt_cache.save_cache(saved, caches, here, {"conversation": json.dumps(talk)})
    data = saved.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    whole_header, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = whole_header["__metadata__"]
    entry = json.loads(metadata["0.mlx_clex"])
    texts = st.one_of(st.text(max_size=20), VALUES.map(json.dumps))
    metadatas = st.one_of(
        st.dictionaries(st.sampled_from([*metadata, "1.9", "2.9.9", "0"]), texts, max_size=3).map(
            lambda new: {**metadata, **new}
        ),
        objects(entry).map(lambda new: {**metadata, "0.mlx_clex": json.dumps(new)}),
    )

    def cache(value: Any) -> object:
        path = folder / "fuzzed.safetensors"
        path.write_bytes(_safetensors({**whole_header, "__metadata__": value}, tensors))
        prompt_cache.metadata_of(path)
        return prompt_cache.load_cache(path, model, here)

    yield Target("prompt cache", metadatas, cache, 3_000)
    talks = st.one_of(objects(talk), VALUES).map(
        lambda new: {**metadata, "0.conversation": json.dumps(new)}
    )

    def restore(value: Any) -> object:
        path = folder / "fuzzed.safetensors"
        path.write_bytes(_safetensors({**whole_header, "__metadata__": value}, tensors))
        return saved_conversation.read_conversation(path, model, here)

    yield Target("conversation", talks, restore, 2_000)

    row = {"label": "a", "length": 64, "perplexity": 12.0, "low": 11.0, "high": 13.0}
    results = {"kind": "perplexity", "settings": {}, "keys": ["label"], "versions": {}}
    files = st.one_of(
        objects({**results, "rows": [row]}),
        objects(row).map(lambda new: {**results, "rows": [new]}),
        VALUES,
    )
    yield Target("results", files, of_json(read_results), 9_000)

    names = [item.name for item in options_of(TrainingOptions)]
    pairs = st.dictionaries(st.sampled_from([*names, "evil"]), VALUES, max_size=4)
    yamls = st.one_of(
        pairs.map(lambda new: json.dumps(new).encode()),
        st.text(alphabet="abi:-[]{}&*!?|>'\"\n 01.#%@`~,", max_size=60).map(str.encode),
        BYTES,
    )

    def options(data: bytes) -> object:
        file.write_bytes(data)
        args = argparse.Namespace(config=str(file), **dict.fromkeys(names))
        return TrainingOptions.of(with_config(args, TrainingOptions))

    yield Target("yaml", yamls, options, 9_000)

    bodies = [
        body for body, _ in {**COMPLETIONS, **CHATS}.values() if body and isinstance(body, dict)
    ]
    fields = sorted({name for body in bodies for name in body})
    for chat in (False, True):
        hello = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
        requests = st.one_of(
            objects(hello, tuple(fields)).map(lambda new: json.dumps(new).encode()),
            st.sampled_from(bodies).flatmap(objects).map(lambda new: json.dumps(new).encode()),
            mutated(json.dumps({**hello, "stop": ["a"], "n": 1}).encode()),
        )

        def request(data: bytes, chat: bool = chat) -> object:
            return read_request(data, chat=chat, served=SERVED, defaults=DEFAULTS)

        name = "chat request" if chat else "request"
        yield Target(name, requests, request, 12_000)

    access = Access("127.0.0.1", ["http://page.example"], "key")
    heads = st.dictionaries(
        st.sampled_from(["Host", "Origin", "Authorization"]),
        st.text(alphabet="htp:/[]@127.0lcaes%\xe9 \t", max_size=30),
    )

    def head(value: dict[str, str]) -> None:
        message = Message()
        for name, text in value.items():
            message[name] = text
        access.check_origin(message, "127.0.0.1")
        access.allowed_origin(message)
        access.check_key(message)

    yield Target("headers", heads, head, 5_000)

    rows = st.one_of(
        objects({"text": "hello"}, ("messages", "prompt", "completion")).map(json.dumps),
        objects({"messages": [{"role": "user", "content": "hi"}]}).map(json.dumps),
        VALUES.map(json.dumps),
    ).map(str.encode)

    columns = {"mask_prompt": False, **corpus.FEATURES}

    def lines(data: bytes) -> object:
        file.with_suffix(".jsonl").write_bytes(data)
        return list(corpus._documents([file.with_suffix(".jsonl")], tokenizer, columns, []))

    yield Target("jsonl rows", st.one_of(rows, BYTES), lines, 5_000)

    stops = st.tuples(
        st.lists(st.text(alphabet="ab\U0001f600", min_size=1, max_size=4), max_size=4),
        st.lists(st.text(alphabet="ab\U0001f600", max_size=5), max_size=8),
    )
    yield Target("stop strings", stops, _stop_strings, 8_000)

    pieces = st.sampled_from(
        ["{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{% if "]
        + ["{{ raise_exception('a') }}", "{% set x = ", " %}", "}}", "{{", "range(3)", "| join"]
        + ["{% endif %}", "bos_token", "m['role']", "'\\ud800'", "loop.index", " ~ ", "{#", "#}"]
        + [TEMPLATES[name] for name in _QUICK]
    )
    _, own = _lazy_model()

    def template(text: str) -> object:
        own.chat_template = text
        own.has_chat_template = True
        messages = [{"role": "user", "content": "hi"}]
        return prompts.render_messages(own, messages, add_generation_prompt=True)

    drawn = st.lists(st.one_of(pieces, st.text(max_size=6)), max_size=6).map("".join)
    yield Target("chat templates", drawn, template, 1_500)

    log = {"iteration": 1, "loss": 5.1, "scale": 3.0, "learning_rate": 1e-5, "tokens": 2}
    logs = st.one_of(objects(log).map(lambda new: json.dumps(new).encode() + b"\n"), BYTES)
    yield Target("training log", logs, of_file(read_log), 3_000)

    index = {"metadata": {}, "weight_map": {"a": "model.safetensors"}}
    choices = st.tuples(
        st.lists(st.sampled_from(_NAMES), max_size=4),
        st.one_of(objects(index), st.builds(lambda m: {"weight_map": m}, VALUES), VALUES),
    )
    yield Target(
        "weights' index",
        choices,
        lambda drawn: source.choose_weights(drawn[0], lambda _: drawn[1], "here"),
        4_000,
    )
    from ..convert.read.test_gguf_file import tiny_gguf

    (folder / "gguf").mkdir()
    gguf, _ = tiny_gguf(folder / "gguf")

    def read_gguf(path: Path) -> object:
        found = gguf_file.read(path)
        return gguf_file.config_of(found), gguf_file.header(found)

    yield Target(".gguf", mutated(gguf.read_bytes()), of_file(read_gguf, ".gguf"), 1_000)
    shard = next((_GOLDEN / "clex_llama").glob("*.bin")).read_bytes()
    yield Target(".bin", mutated(shard), of_file(torch_bin.read_header, ".bin"), 1_500)
    yield from folder_targets(folder, _BUNDLED)


_BUNDLED = Path(prompts.__file__).parents[1] / "bundled" / "clex"
_GOLDEN = Path(__file__).parents[1] / "golden"
# Templates of the hostile cases that end at once; time and memory are the cases' own.
_QUICK: tuple[str, ...] = (
    "raises",
    "syntax",
    "an unknown filter",
    "undefined",
    "a division by zero",
    "attr",
)
_QUICK += ("a text and a number", "classes", "include", "import", "recursion", "sorted", "tojson")
_NAMES = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
_NAMES += ["model.safetensors.index.json", "pytorch_model.bin.index.json", "a.gguf", "b.gguf"]
_NAMES += ["model-00001-of-99999999999.safetensors", "model-.safetensors"]


def _lazy_model() -> tuple[Any, Any]:
    from mlx_lm.utils import load_tokenizer

    from mlx_clex.loading import _load_model

    model, _ = _load_model(_BUNDLED, None, None)
    return model, load_tokenizer(_BUNDLED)


def _safetensors(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _stop_strings(drawn: tuple[list[str], list[str]]) -> None:
    """Compare a text in pieces with the definition."""
    strings, pieces = drawn
    stops = StopStrings(strings)
    passed = "".join(stops.add(piece) for piece in pieces) + stops.end()
    text = "".join(pieces)
    ends = (
        (i, -len(s), i - len(s))
        for i in range(len(text) + 1)
        for s in strings
        if text[:i].endswith(s)
    )
    first = min(ends, default=(0, 0, len(text)))
    assert passed == text[: first[2]], (strings, pieces, passed)
