"""Hostile adapters, saves of training, prompt caches and saved conversations."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .case import (
    FINE,
    REFUSED,
    Case,
    Tensors,
    both,
    config,
    deep,
    floats,
    gone,
    header,
    inside,
    linked,
    made_folder,
    many,
    piped,
    put,
    raw_header,
    tensors,
    write_safetensors,
)

_SETTINGS = "adapter_config.json"
_ADAPTERS = "adapters.safetensors"
_TWO = ("adapters", "fuse")
_NAN = float("nan")


def _first(
    end: str, change: Callable[[tuple[str, list[int], bytes]], Any]
) -> Callable[[Path], None]:
    """Return an edit of the first adapter tensor whose name ends so; None deletes it."""

    def edit(found: Tensors) -> None:
        name = next(name for name in found if name.endswith(end))
        new = change(found.pop(name))
        if new is not None:
            found[name] = new

    return tensors(edit, _ADAPTERS)


def _adapters() -> Iterator[Case]:
    settings: dict[str, list[Any]] = {
        "fine_tune_type": ["dora", "evil", 5, None, []],
        "num_layers": ["2", -2, 1.5, [], 1 << 40, True, None],
        "lora_parameters": [..., None, [], "x", {}, {"rank": 2}],
        "rope_scaling": ["x", [], {"type": "evil"}, {"type": "clex", "max_factor": 1e308}],
        "trained_scaling": [True],
        "trained_extra": [True],
    }
    for key, values in settings.items():
        for value in values:
            shown = "gone" if value is ... else json.dumps(value)
            edit = config(_SETTINGS, **{key: value})
            yield Case("adapter settings", f"{key} {shown}", "adapters", edit, _TWO)
    ranks: list[Any] = ["8", 0, -1, 1.5, True, None, [], 3, 10**8, 1 << 70]
    parameters: dict[str, list[Any]] = {
        "rank": ranks,
        "scale": ["20", [], None, 1e308, _NAN, True],
        "dropout": ["0", -1, 2, _NAN, []],
        "keys": ["q_proj", [5], ["no.such"], {}],
    }
    for key, values in parameters.items():
        for value in values:
            edit = inside("lora_parameters", _SETTINGS, **{key: value})
            yield Case("adapter settings", f"{key} {json.dumps(value)}", "adapters", edit, _TWO)
    for name in (_SETTINGS, _ADAPTERS):
        for word, edit in {
            "empty": put(name, ""),
            "deep": put(name, deep()),
            "a list": put(name, "[]"),
            "gone": gone(name),
            "a pipe": piped(name),
            "a folder": made_folder(name),
            "a link out": linked(name, "OUTSIDE/secret.json"),
            "a link to zeros": linked(name, "/dev/zero"),
        }.items():
            yield Case("adapter file", f"{name} {word}", "adapters", edit, _TWO)
    for name, edit in {
        "NaN": _first("lora_a", lambda t: (*t[:2], floats(_NAN, len(t[2]) // 4))),
        "1e30": _first("lora_a", lambda t: (*t[:2], floats(1e30, len(t[2]) // 4))),
        "without a lora_a": _first("lora_a", lambda _: None),
        "without a lora_b": _first("lora_b", lambda _: None),
        "a tensor too small": _first("lora_a", lambda t: (t[0], [1, 1], t[2][:4])),
        "whole numbers": _first("lora_a", lambda t: ("I32", t[1], t[2])),
        "of other layers": tensors(
            lambda t: [t.update({n.replace("layers.1", "layers.9"): t.pop(n)}) for n in list(t)],
            _ADAPTERS,
        ),
        "one tensor more": tensors(lambda t: t.update(evil=("F32", [1], b"1234")), _ADAPTERS),
        "no tensors": put(_ADAPTERS, b"\2\0\0\0\0\0\0\0{}"),
        "a deep header": raw_header(deep().encode(), _ADAPTERS),
        "900,000 empty tensors": raw_header(many(900_000), _ADAPTERS),
        "the data cut": _cut(_ADAPTERS),
        "a scaling of another model": both(
            inside_none,
            lambda f: write_safetensors(f / "scaling.safetensors", {"x": ("F32", [1], b"1234")}),
        ),
        "norms of another model": lambda f: write_safetensors(
            f / "norms_embeddings.safetensors", {"x": ("F32", [1], b"1234")}
        ),
        "norms of NaN": lambda f: write_safetensors(
            f / "norms_embeddings.safetensors",
            {"model.norm.weight": ("F32", [64], floats(_NAN, 64))},
        ),
        "a current that leads out": lambda f: (f / "current").symlink_to("/etc"),
        "a current of itself": both(
            gone(_SETTINGS), lambda f: (f / "current").symlink_to("current")
        ),
    }.items():
        yield Case("adapters", name, "adapters", edit, _TWO)


def inside_none(_: Path) -> None:
    """Change nothing."""


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 100)


def _metadata(file: str, **changes: Any) -> Callable[[Path], None]:
    """Return an edit of the metadata of a safetensors file; `...` deletes an entry."""

    def change(entries: dict[str, Any]) -> None:
        for name, value in changes.items():
            if value is ...:
                entries["__metadata__"].pop(name, None)
            else:
                entries["__metadata__"][name] = value

    return header(change, file)


def _state(file: str, key: str, **changes: Any) -> Callable[[Path], None]:
    """Return an edit of a JSON text within the metadata."""

    def change(entries: dict[str, Any]) -> None:
        state = json.loads(entries["__metadata__"][key])
        state.update(changes)
        entries["__metadata__"][key] = json.dumps(state)

    return header(change, file)


def _same_for_both(file: str) -> dict[str, Callable[[Path], object]]:
    """Return edits of a saved cache, a conversation's too."""

    def of_keys(change: Callable[[tuple[str, list[int], bytes]], Any]) -> Callable[[Path], None]:
        return tensors(lambda t: t.update({"0.0": change(t["0.0"])}), file)

    return {
        "empty": put(file, ""),
        "noise": put(file, bytes(range(256)) * 30),
        "a pipe": piped(file),
        "a folder": made_folder(file),
        "a link to zeros": linked(file, "/dev/zero"),
        "cut": _cut(file),
        "a deep header": raw_header(deep().encode(), file),
        "900,000 empty tensors": raw_header(many(900_000), file),
        "no metadata": header(lambda e: e.pop("__metadata__") and None, file),
        "metadata of numbers": _metadata(file, **{"0.mlx_clex": 5}),
        "our entry deep": _metadata(file, **{"0.mlx_clex": deep(20_000)}),
        "our entry a list": _metadata(file, **{"0.mlx_clex": "[]"}),
        "no scales": _state(file, "0.mlx_clex", scales=[]),
        "scales of texts": _state(file, "0.mlx_clex", scales=["a", "b"]),
        "scales of NaN": _state(file, "0.mlx_clex", scales=[_NAN, _NAN]),
        "scales of 1e308": _state(file, "0.mlx_clex", scales=[1e308, 1e308]),
        "another model": _state(file, "0.mlx_clex", fingerprint={"model": "x", "weights": "y"}),
        "a fingerprint list": _state(file, "0.mlx_clex", fingerprint=[1]),
        "a class of os": _metadata(file, **{"1.0": "os.system"}),
        "a class of builtins": _metadata(file, **{"1.0": "__import__"}),
        "another class": _metadata(file, **{"1.0": "MambaCache"}),
        "a class less": _metadata(file, **{"1.1": ...}),
        "10^9 classes": _metadata(file, **{"1.1000000000": "KVCache"}),
        "10^9 layers": tensors(lambda t: t.update({"1000000000.0": t.pop("0.0")}), file),
        "a class within": _metadata(file, **{"1.0.0.0.0.0": "KVCache"}),
        "keys of NaN": of_keys(lambda t: (*t[:2], floats(_NAN, len(t[2]) // 4))),
        "keys of whole numbers": of_keys(lambda t: ("I32", *t[1:])),
        "keys too short": of_keys(lambda t: (t[0], [1, 4, 1, 16], t[2][: 4 * 64])),
        "keys of other heads": of_keys(lambda t: (t[0], [1, 2, 512, 16], t[2])),
        "keys with more axes": of_keys(lambda t: (t[0], [1, 1, 4, 256, 16], t[2])),
        "a layer less": tensors(lambda t: t.pop("1.0") and None, file),
        "a length of 2^30": tensors(
            lambda t: t.update({"0.2": ("I32", [], (1 << 30).to_bytes(4, "little"))}), file
        ),
        "a negative length": tensors(lambda t: t.update({"0.2": ("I32", [], b"\xff" * 4)}), file),
        "a length of NaN": tensors(lambda t: t.update({"0.2": ("F32", [], floats(_NAN, 1))}), file),
        "a length that is a list": tensors(
            lambda t: t.update({"0.2": ("I32", [2], b"\0" * 8)}), file
        ),
        "names without dots": tensors(lambda t: t.update(evil=t.pop("0.0")), file),
    }


def _caches() -> Iterator[Case]:
    for name, edit in _same_for_both("cache.safetensors").items():
        yield Case("prompt cache", name, "cache", edit, ("cache",))
    for name, value in {
        "a model of the hub": "someone/evil",
        "a model outside": "/etc",
        "a model of many lines": "a\nb\x1b[2J",
        "no model": ...,
    }.items():
        edit = _metadata("cache.safetensors", **{"0.model": value})
        yield Case("prompt cache", name, "cache", edit, ("cache-alone",))
    for name, value, status in (
        ("code", '{"trust_remote_code": true}', FINE),  # only the end token is taken
        ("an end token of no text", '{"eos_token": 5}', FINE),
        ("an unknown end token", '{"eos_token": "nowhere"}', REFUSED),
        ("an end token of half a character", '{"eos_token": "\\ud800"}', REFUSED),
        ("a list", "[1]", REFUSED),
        ("deep", deep(20_000), REFUSED),
    ):
        edit = _metadata("cache.safetensors", **{"0.tokenizer_config": value})
        name = f"tokenizer settings: {name}"
        yield Case("prompt cache", name, "cache", edit, ("cache-alone",), status)


def _talks() -> Iterator[Case]:
    file, key = "talk.safetensors", "0.conversation"
    hello = {"role": "user", "content": "hi"}
    edits = _same_for_both(file)
    edits |= {
        "no conversation": _metadata(file, **{key: ...}),
        "a deep conversation": _metadata(file, **{key: deep(20_000)}),
        "a conversation list": _metadata(file, **{key: "[]"}),
    }
    settings: dict[str, dict[str, Any]] = {
        "another format": {"format": "99"},
        "no messages": {"messages": []},
        "messages a text": {"messages": "hi"},
        "messages of numbers": {"messages": [5, 6]},
        "a content of numbers": {"messages": [{"role": "user", "content": 5}, hello]},
        "two users": {"messages": [hello, hello]},
        "a role of many": {"messages": [{"role": "system", "content": "x"}]},
        "a surrogate": {"messages": [{"role": "user", "content": "\ud800"}]},
        "tokens beyond the vocabulary": {"tokens": [1, 512]},
        "negative tokens": {"tokens": [-1]},
        "tokens of texts": {"tokens": ["a"]},
        "tokens of booleans": {"tokens": [True]},
        "more tokens than the reach": {"tokens": [1] * 300},
        "cached beyond": {"cached": 1 << 40},
        "cached negative": {"cached": -1},
        "cached a text": {"cached": "6"},
        "ended a text": {"ended": "yes"},
        "open": {"open": True},
        "asked beyond": {"asked": 1 << 40},
        "a system prompt of numbers": {"system_prompt": 5},
    }
    for name, changes in settings.items():
        edits[name] = _state(file, key, **changes)
    for name, edit in edits.items():
        yield Case("conversation", name, "talk", edit, ("restore",), FINE)


def _saves() -> Iterator[Case]:
    """Broken saves of a run that is to be resumed."""
    state, optimizer = "current/state.json", "current/optimizer.safetensors"
    adapters = f"current/{_ADAPTERS}"
    for name, edit in {
        "no state": lambda f: (f / state).unlink(),
        "an empty state": put(state, ""),
        "a deep state": put(state, deep()),
        "a state list": put(state, "[]"),
        "a state of nothing": put(state, "{}"),
        "an iteration of a text": inside("progress", state, iteration="1"),
        "a negative iteration": inside("progress", state, iteration=-1),
        "half an iteration": inside("progress", state, iteration=1.5),
        "an iteration that is true": inside("progress", state, iteration=True),
        "losses of NaN": inside("progress", state, losses=_NAN),
        "tokens of a text": inside("progress", state, tokens="5"),
        "no progress": config(state, progress=...),
        "an unknown counter": inside("progress", state, evil=1),
        "a place beyond the data": inside("data", state, index=1 << 40),
        "a place of a text": inside("data", state, index="0"),
        "a negative epoch": inside("data", state, epoch=-1),
        "another generator": inside("rng", state, bit_generator="MT19937"),
        "a state of the generator that is a text": inside("rng", state, state="x"),
        "settings that are a text": config(state, same="x"),
        "settings of another run": inside("same", state, learning_rate=1.0),
        "a state that is a pipe": piped(state),
        "no optimizer": lambda f: (f / optimizer).unlink(),
        "an empty optimizer": put(optimizer, ""),
        "a deep optimizer": raw_header(deep().encode(), optimizer),
        "an optimizer cut": _cut(optimizer),
        "an optimizer of other tensors": lambda f: write_safetensors(
            f / optimizer, {"x": ("F32", [1], b"1234")}
        ),
        "an optimizer of NaN": _all_nan(optimizer),
        "an optimizer of whole numbers": _typed(optimizer, "I32"),
        "adapters of NaN": _all_nan(adapters),
        "adapters of whole numbers": _typed(adapters, "I32"),
        "adapters of other shapes": _flat(adapters),
        "adapters of other tensors": lambda f: write_safetensors(
            f / adapters, {"x": ("F32", [1], b"1234")}
        ),
        "no adapters": lambda f: (f / adapters).unlink(),
        "a state that is a link out": linked(state, "OUTSIDE/secret.json"),
        "adapters that are a link out": linked(adapters, "OUTSIDE/secret.txt"),
        "saves that are a link out": _moved_out("checkpoints"),
        "a current that leads out": both(gone("current"), linked("current", "OUTSIDE")),
        "a log that is a link out": linked("log.jsonl", "OUTSIDE/secret.txt"),
    }.items():
        yield Case("saves", name, "saves", edit, ("resume",))
    # No resumed run reads it; the next save replaces it.
    edit = put("current/adapter_config.json", deep())
    yield Case("saves", "a deep config", "saves", edit, ("resume",), FINE)
    for name, edit in {
        "a log of noise": put("log.jsonl", bytes(range(256))),
        "a deep log": put("log.jsonl", deep()),
        "a log of lists": put("log.jsonl", "[1]\n[2]\n"),
        "a log of texts": put("log.jsonl", '{"step": "a", "loss": "b"}\n'),
        "a log of loose texts": put("log.jsonl", '{"iteration": 1, "loss": "b"}\n'),
        "an iteration of a text": put("log.jsonl", '{"iteration": "1", "loss": 1.0}\n'),
        "an iteration of 10^400": put("log.jsonl", f'{{"iteration": {10**400}, "loss": 1.0}}\n'),
        "a negative iteration": put("log.jsonl", '{"iteration": -1, "loss": 1.0}\n'),
        "perplexities in a list": put("log.jsonl", '{"iteration": 1, "perplexity": [1]}\n'),
        "a length of a word": put(
            "log.jsonl", '{"iteration": 1, "valid_loss": 1.0, "perplexity": {"a": 1.0}}\n'
        ),
        "a perplexity of a text": put(
            "log.jsonl", '{"iteration": 1, "valid_loss": 1.0, "perplexity": {"32": "a"}}\n'
        ),
        "a huge loss": put("log.jsonl", f'{{"iteration": 1, "loss": {10**400}}}\n'),
        "a log of NaN": put("log.jsonl", '{"step": 1, "loss": NaN}\n'),
        "an empty log": put("log.jsonl", ""),
        "a log that is a pipe": piped("log.jsonl"),
        "a log that is a link out": linked("log.jsonl", "OUTSIDE/secret.txt"),
    }.items():
        yield Case("training log", name, "saves", edit, ("log",))


def _each(
    file: str, change: Callable[[tuple[str, list[int], bytes]], Any]
) -> Callable[[Path], None]:
    """Return an edit of every tensor of a safetensors file."""
    return tensors(lambda found: found.update({n: change(t) for n, t in found.items()}), file)


def _all_nan(file: str) -> Callable[[Path], None]:
    return _each(file, lambda t: (*t[:2], floats(_NAN, len(t[2]) // 4)) if t[0] == "F32" else t)


def _typed(file: str, dtype: str) -> Callable[[Path], None]:
    return _each(file, lambda t: (dtype, *t[1:]) if t[0] == "F32" else t)


def _flat(file: str) -> Callable[[Path], None]:
    return _each(file, lambda t: (t[0], [math.prod(t[1])], t[2]))


def _moved_out(name: str) -> Callable[[Path], None]:
    """Return an edit that leaves a link in place of a folder, to where it is moved."""

    def edit(folder: Path) -> None:
        away = folder.parent / f"moved-{name}"
        (folder / name).rename(away)
        (folder / name).symlink_to(away)

    return edit


def cases() -> Iterator[Case]:
    """Yield the cases."""
    yield from _adapters()
    yield from _caches()
    yield from _talks()
    yield from _saves()
