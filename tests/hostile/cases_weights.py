"""Hostile weights: safetensors, .bin and .gguf files."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .case import (
    ALL,
    BOTH,
    FINE,
    Case,
    Data,
    Tensors,
    both,
    config,
    deep,
    floats,
    gone,
    header,
    linked,
    made_folder,
    many,
    piped,
    put,
    raw_header,
    sparse,
    tensors,
)

_EMBEDDING = "model.embed_tokens.weight"
_LAYER = "model.layers.0."
_NAMES: tuple[str, ...] = (
    _EMBEDDING,
    "lm_head.weight",
    "model.norm.weight",
    f"{_LAYER}input_layernorm.weight",
)
_NAMES += (f"{_LAYER}self_attn.q_proj.weight", f"{_LAYER}mlp.down_proj.weight")
_INF = float("inf")
_NAN = float("nan")


def _filled(name: str, value: float) -> Callable[[Tensors], None]:
    def change(found: Tensors) -> None:
        dtype, shape, data = found[name]
        found[name] = dtype, shape, floats(value, 1) + data[4:]

    return change


def _times(value: float) -> Callable[[Tensors], None]:
    def change(found: Tensors) -> None:
        for name, (dtype, shape, data) in found.items():
            numbers = struct.unpack(f"<{len(data) // 4}f", data)
            found[name] = dtype, shape, b"".join(struct.pack("<f", n * value) for n in numbers)

    return change


def _scaling(value: float, only_one: bool = False) -> Callable[[Tensors], None]:
    """Fill the learned tensors of the scaling."""

    def change(found: Tensors) -> None:
        for name, (dtype, shape, data) in found.items():
            if "scaling" in name or "rotary" in name:
                count = len(data) // 4
                found[name] = (
                    dtype,
                    shape,
                    (floats(value, 1) + data[4:] if only_one else floats(value, count)),
                )

    return change


def _shape(name: str, shape: list[int]) -> Callable[[Tensors], None]:
    def change(found: Tensors) -> None:
        dtype, _, data = found[name]
        count = 1
        for size in shape:
            count *= size
        found[name] = dtype, shape, (data * (4 * count // max(len(data), 1) + 1))[: 4 * count]

    return change


def _changes(name: str) -> dict[str, Callable[[Tensors], object]]:
    return {
        "gone": lambda found: found.pop(name),
        "of whole numbers": lambda found: found.update({name: ("I32", *found[name][1:])}),
        "too small": _shape(name, [3]),
        "empty": lambda found: found.update({name: ("F32", [0], b"")}),
    }


def _entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries[name].update(fields)


def _tensors() -> Iterator[Case]:
    for name in _NAMES:
        short = name.removeprefix("model.")
        for word, value in (("NaN", _NAN), ("infinity", _INF)):
            edit = tensors(_filled(name, value))
            commands = ("generate", "measure", "convert", "freeze", "freeze-gguf")
            yield Case("numbers", f"{word} in {short}", "ours", edit, commands)
        for word, change in _changes(name).items():
            yield Case("tensor", f"{short} {word}", "ours", tensors(change))
    yield Case("numbers", "times 1e30", "ours", tensors(_times(1e30)), ("generate",))
    yield Case("numbers", "times 0", "ours", tensors(_times(0)), ("generate",))
    for word, value in (("NaN", _NAN), ("infinity", _INF), ("1e30", 1e30)):
        edit = tensors(_scaling(value))
        commands = ("generate", "freeze", "convert", "frequencies", "doctor")
        yield Case("scaling tensors", word, "ours", edit, commands)
        edit = tensors(_scaling(value, only_one=True))
        yield Case("scaling tensors", f"one {word}", "ours", edit, ("generate", "freeze"))
    yield Case("tensor", "one more", "ours", tensors(lambda t: t.update(x=("F32", [1], b"1234"))))
    edit = tensors(lambda t: [t.update({f"a\n\x1b[2J{i}": ("F32", [1], b"1234")}) for i in "ab"])
    yield Case("tensor", "names with escapes", "ours", edit)
    edit = tensors(lambda t: t.update({"../../x": ("F32", [1], b"1234")}))
    yield Case("tensor", "a name with a path", "ours", edit)
    edit = config(num_hidden_layers=10_000)
    yield Case("tensor", "10,000 layers", "ours", edit, ALL)
    edit = config(num_hidden_layers=1)
    yield Case("tensor", "a layer less", "ours", edit)


def _headers() -> Iterator[Case]:
    huge = 1 << 62
    for name, edit in {
        "empty": put("model.safetensors", b""),
        "7 bytes": put("model.safetensors", b"\1\0\0\0\0\0\0"),
        "noise": put("model.safetensors", bytes(range(256)) * 40),
        "a header beyond the file": put("model.safetensors", struct.pack("<Q", huge) + b"{}"),
        "a header of nothing": raw_header(b""),
        "a header of a list": raw_header(b"[]"),
        "no tensors": raw_header(b"{}"),
        "a deep header": raw_header(deep().encode()),
        "a deep entry": raw_header(b'{"a":' + deep().encode() + b"}"),
        "no UTF-8": raw_header(b'{"\xff": {}}'),
        "900,000 empty tensors": raw_header(many(900_000)),
        "a header of 90 MB of spaces": raw_header(lambda: b"{}" + b" " * 90_000_000),
        "a shape beyond 64 bits": header(_entry(_EMBEDDING, shape=[1 << 40, 1 << 40])),
        "a negative shape": header(_entry(_EMBEDDING, shape=[-512, -64])),
        "a shape of fractions": header(_entry(_EMBEDDING, shape=[512.0, 64.0])),
        "a shape of texts": header(_entry(_EMBEDDING, shape=["512", "64"])),
        "a shape of 100,000 axes": header(_entry(_EMBEDDING, shape=[1] * 100_000)),
        "offsets that overlap": header(_entry(_EMBEDDING, data_offsets=[0, 131072])),
        "offsets beyond the file": header(_entry(_EMBEDDING, data_offsets=[huge, huge + 131072])),
        "offsets backwards": header(_entry(_EMBEDDING, data_offsets=[131072, 0])),
        "one offset": header(_entry(_EMBEDDING, data_offsets=[0])),
        "offsets of texts": header(_entry(_EMBEDDING, data_offsets=["0", "131072"])),
        "offsets null": header(_entry(_EMBEDDING, data_offsets=None)),
        "an unknown type": header(_entry(_EMBEDDING, dtype="F4_E2M1")),
        "a type of 5": header(_entry(_EMBEDDING, dtype=5)),
        "a type list": header(_entry(_EMBEDDING, dtype=["F32"])),
        "an entry of null": header(lambda e: e.update({_EMBEDDING: None})),
        "metadata of numbers": header(lambda e: e.update(__metadata__={"format": 5})),
        "metadata a text": header(lambda e: e.update(__metadata__="mlx")),
        "the data cut": _cut("model.safetensors", -1000),
        "the data too long": _grown("model.safetensors", 8),
        "a folder": made_folder("model.safetensors"),
        "a pipe": piped("model.safetensors"),
        "a link to zeros": linked("model.safetensors", "/dev/zero"),
        "a link out": linked("model.safetensors", "OUTSIDE/secret.txt"),
        "gone": gone("model.safetensors"),
        "a terabyte of nothing": sparse("model.safetensors", 1 << 40),
    }.items():
        yield Case("safetensors", name, "ours", edit, ALL)
    index = "model.safetensors.index.json"
    for name, edit in {
        "a path": put(index, json.dumps({"weight_map": {"a": "../../outside/secret.txt"}})),
        "an absolute path": put(index, json.dumps({"weight_map": {"a": "/etc/passwd"}})),
        "a list": put(index, "[]"),
        "a map of numbers": put(index, '{"weight_map": {"a": 5}}'),
        "deep": put(index, deep()),
        "a pipe": piped(index),
        "a link to zeros": linked(index, "/dev/zero"),
        "a link out": linked(index, "OUTSIDE/secret.json"),
        "a shard that is not there": put(
            index,
            '{"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}',
        ),
    }.items():
        yield Case("index", name, "published", edit, ("convert", "doctor"))
    name = "model-00001-of-99999999999.safetensors"
    edit = both(gone(index), lambda f: (f / "model-00001-of-00002.safetensors").rename(f / name))
    yield Case("index", "99,999,999,999 shards", "published", edit, ("convert", "doctor"))


def _cut(name: str, to: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:to])

    return edit


def _grown(name: str, by: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b"\0" * by)

    return edit


class _Calls:
    """A pickle that calls a function with arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _archive(data: bytes, records: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """Return a zip file as torch writes it, with this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, record in (records or {}).items():
            archive.writestr(name, record)
    return buffer.getvalue()


def _integer(number: int) -> bytes:
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _tensor_pickle(shape: Sequence[int], *, count: int = 64, stride: int = 1) -> bytes:
    """Return a pickle of {"x": tensor} as torch writes it; its sizes may lie.

    Args:
        shape: of the tensor.
        count: the numbers in its storage.
        stride: of each axis.
    """
    storage = _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu")
    storage = b"(" + storage + _integer(count) + b"tQ"
    sizes = b"(" + b"".join(map(_integer, shape)) + b"t"
    strides = b"(" + _integer(stride) * len(shape) + b"t"
    hooks = b"ccollections\nOrderedDict\n)R"
    args = b"(" + storage + b"K\0" + sizes + strides + b"\x89" + hooks + b"t"
    return b"\x80\x02}" + _text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"Rs."


def _laughs() -> bytes:
    """Return a pickle of few bytes whose list has 10^9 entries, shared."""
    value: Any = ["lol"] * 10
    for _ in range(9):
        value = [value] * 10
    return pickle.dumps({"x": value}, protocol=2)


def _nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def _bins() -> Iterator[Case]:
    shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    whole = {"archive/data/0": b"\0" * 256}

    def only(data: Data) -> Callable[[Path], None]:
        """Return an edit after which the checkpoint is this one .bin file."""
        return both(gone(*shards, "pytorch_model.bin.index.json"), put("pytorch_model.bin", data))

    touch = f"touch {{}}/{'canary'}"
    deflated: dict[str, Any] = {"compression": zipfile.ZIP_DEFLATED}
    pickles: dict[str, Data] = {
        "os.system": _archive(pickle.dumps(_Calls(os.system, touch), protocol=2)),
        "eval": _archive(pickle.dumps({"x": _Calls(eval, "1/0")}, protocol=2)),
        "os.system, old": pickle.dumps(_Calls(os.system, touch), protocol=2),
        "exec in text": b"cbuiltins\nexec\n(S'import os'\ntR.",
        "getattr": _archive(pickle.dumps({"x": _Calls(getattr, 1, "real")}, protocol=2)),
        "bytearray of 16 GB": _archive(pickle.dumps({"x": _Calls(bytearray, 1 << 34)}, protocol=2)),
        "bytearray, old": pickle.dumps({"x": _Calls(bytearray, 1 << 34)}, protocol=2),
        "bytearray in text": b"cbuiltins\nbytearray\n(I17179869184\ntR.",
        "OrderedDict of a range": b"\x80\x02ccollections\nOrderedDict\n"
        b"cbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
        "torch.Size of 2^62": b"\x80\x02ctorch\nSize\n(\x8a\x08" + b"\0" * 7 + b"\x40t\x85R.",
        "a zip bomb": lambda: _archive(b"\0" * (1 << 28), **deflated),
        "a zip bomb of data": lambda: _archive(
            _tensor_pickle((1 << 26,), count=1 << 26),
            {"archive/data/0": b"\0" * (1 << 28)},
            **deflated,
        ),
        "a whole one": _archive(_tensor_pickle((64,)), whole),
        "a storage that is not there": _archive(_tensor_pickle((64,))),
        "a storage of 1 GB in 256 bytes": _archive(_tensor_pickle((1 << 28,), count=1 << 28)),
        "a storage too short": _archive(_tensor_pickle((1 << 20,), count=1 << 20), whole),
        "strides beyond the storage": _archive(_tensor_pickle((64,), stride=1 << 40), whole),
        "a negative size": _archive(_tensor_pickle((-64,)), whole),
        "a size beyond 64 bits": _archive(_tensor_pickle((1 << 70,)), whole),
        "no tensor": _archive(pickle.dumps({"x": 5}, protocol=2)),
        "a list": _archive(pickle.dumps([1, 2], protocol=2)),
        "keys of numbers": _archive(pickle.dumps({5: 5}, protocol=2)),
        "an empty dictionary": _archive(pickle.dumps({}, protocol=2)),
        "10^9 entries": _archive(_laughs()),
        "10^9 entries, old": _laughs(),
        "nested 100,000 times": _archive(_nested(100_000)),
        "nested, old": _nested(100_000),
        "BINBYTES8 of 2^62": _archive(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"a."),
        "BINUNICODE8 of 2^40, old": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"a.",
        "LONG4 of 2 GB": _archive(b"\x80\x02\x8b\xff\xff\xff\x7fa."),
        "PUT at 2^31": _archive(b"\x80\x02}r\xff\xff\xff\x7f."),
        "a frame of 2^62": _archive(b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}."),
        "an empty pickle": _archive(b""),
        "a pickle without an end": _archive(b"\x80\x02}"),
        "no pickle": _archive(b"hello"),
        "an empty file": b"",
        "noise": bytes(range(256)) * 100,
        "an empty zip": _empty_zip(),
        "names with paths": _archive(pickle.dumps({}, protocol=2), {"../../x": b"1"}),
        "60,000 records": lambda: _archive(
            pickle.dumps({}, protocol=2), {f"archive/data/{n}": b"" for n in range(60_000)}
        ),
        "a zip64 directory that lies": _archive(pickle.dumps({}, protocol=2))[:-22]
        + b"PK\5\6"
        + b"\0" * 4
        + b"\xff\xff" * 2
        + b"\xff" * 8
        + b"\0\0",
    }
    for name, data in pickles.items():
        commands = BOTH if "os.system" in name else ("convert",)
        yield Case("bin", name, "bins", only(data), commands)
    for to in (0, 10, 1000, 60_000):
        yield Case("bin", f"cut to {to} bytes", "bins", _cut(shards[0], to), BOTH)
    for name, edit in {
        "a pipe": piped(shards[0]),
        "a link to zeros": linked(shards[0], "/dev/zero"),
        "a link out": linked(shards[0], "OUTSIDE/secret.txt"),
        "a folder": made_folder(shards[0]),
        "an index that is a pipe": piped("pytorch_model.bin.index.json"),
    }.items():
        yield Case("bin", name, "bins", edit, BOTH)


def _empty_zip() -> bytes:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    return buffer.getvalue()


def _patched(at: int, data: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        whole = bytearray((folder / "model.gguf").read_bytes())
        whole[at : at + len(data)] = data
        (folder / "model.gguf").write_bytes(whole)

    return edit


def _replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        whole = (folder / "model.gguf").read_bytes()
        assert old in whole, old
        (folder / "model.gguf").write_bytes(whole.replace(old, new, 1))

    return edit


def _field(key: bytes, kind: int, value: bytes) -> Callable[[Path], None]:
    """Return an edit that overwrites the first bytes of a value; its type becomes `kind`."""

    def edit(folder: Path) -> None:
        whole = bytearray((folder / "model.gguf").read_bytes())
        at = whole.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
        whole[at : at + 4] = struct.pack("<I", kind)
        whole[at + 4 : at + 4 + len(value)] = value
        (folder / "model.gguf").write_bytes(whole)

    return edit


# doctor looks at neither names nor tokens.
_READ_BY_CONVERT = {"another tokenizer", "a tensor of another name"}


def _ggufs() -> Iterator[Case]:
    u64 = struct.Struct("<Q").pack
    u32 = struct.Struct("<I").pack
    llama = b"llama."
    for name, edit in {
        "empty": put("model.gguf", b""),
        "noise": put("model.gguf", bytes(range(256)) * 40),
        "the magic alone": put("model.gguf", b"GGUF"),
        "version 0": _patched(4, u32(0)),
        "version 99": _patched(4, u32(99)),
        "of the other byte order": _patched(4, b"\0\0\0\3"),
        "2^62 tensors": _patched(8, u64(1 << 62)),
        "no tensors": _patched(8, u64(0)),
        "10^8 tensors": _patched(8, u64(10**8)),
        "2^62 settings": _patched(16, u64(1 << 62)),
        "no settings": _patched(16, u64(0)),
        "a key of 2^60 bytes": _patched(24, u64(1 << 60)),
        "cut in the settings": _cut("model.gguf", 300),
        "cut in the data": _cut("model.gguf", -5000),
        "a pipe": piped("model.gguf"),
        "a link to zeros": linked("model.gguf", "/dev/zero"),
        "a folder": made_folder("model.gguf"),
        "another architecture": _replaced(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0basel"),
        "a text of 2^60 bytes": _field(b"general.architecture", 8, u64(1 << 60)),
        "a list of 2^60": _field(b"tokenizer.ggml.tokens", 9, u32(8) + u64(1 << 60)),
        "a list of lists": _field(b"tokenizer.ggml.tokens", 9, u32(9) + u64(1 << 30)),
        "a list of an unknown type": _field(b"tokenizer.ggml.tokens", 9, u32(77) + u64(1)),
        "an unknown type": _field(llama + b"block_count", 77, b""),
        "no layers": _field(llama + b"block_count", 4, u32(0)),
        "2^31 layers": _field(llama + b"block_count", 4, u32(1 << 31)),
        "negative layers": _field(llama + b"block_count", 5, b"\xff" * 4),
        "no heads": _field(llama + b"attention.head_count", 4, u32(0)),
        "2^31 heads": _field(llama + b"attention.head_count", 4, u32(1 << 31)),
        "a width of 2^31": _field(llama + b"embedding_length", 4, u32(1 << 31)),
        "a width of a fraction": _field(llama + b"embedding_length", 6, struct.pack("<f", 64.5)),
        "a length of 0": _field(llama + b"context_length", 4, u32(0)),
        "a base of NaN": _field(llama + b"rope.freq_base", 6, struct.pack("<f", _NAN)),
        "an epsilon of NaN": _field(
            llama + b"attention.layer_norm_rms_epsilon", 6, floats(_NAN, 1)
        ),
        "without a vocabulary": _replaced(b"tokenizer.ggml.tokens", b"tokenizer.ggml.takens"),
        "another tokenizer": _replaced(b"tokenizer.ggml.model", b"tokenizer.ggml.madel"),
        "a tensor of another name": _replaced(b"blk.0.attn_q.weight", b"blk.9.attn_q.weight"),
        "a tensor twice": _replaced(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"),
        "a tensor with a path": _replaced(b"blk.0.attn_q.weight", b"../../../../../etc/"),
        "a size of 2^62": _after(b"blk.0.attn_q.weight", 4, u64(1 << 62)),
        "9,999 axes": _after(b"blk.0.attn_q.weight", 0, u32(9999)),
        "a size of 0": _after(b"blk.0.attn_q.weight", 4, u64(0)),
        "an unknown quantisation": _after(b"blk.0.attn_q.weight", 20, u32(99)),
        "an offset of 2^62": _after(b"blk.0.attn_q.weight", 24, u64(1 << 62)),
        "an offset of 1": _after(b"blk.0.attn_q.weight", 24, u64(1)),
    }.items():
        other = {"gguf-doctor": FINE} if name in _READ_BY_CONVERT else {}
        yield Case("gguf", name, "gguf", edit, ("gguf-convert", "gguf-doctor"), other=other)
    # By its own path, a link is what the user named.
    edit = linked("model.gguf", "OUTSIDE/secret.txt")
    yield Case("gguf", "a link out", "gguf", edit, ("convert",))


def _after(name: bytes, at: int, data: bytes) -> Callable[[Path], None]:
    """Return an edit that overwrites what follows a tensor's name."""

    def edit(folder: Path) -> None:
        whole = bytearray((folder / "model.gguf").read_bytes())
        start = whole.index(u64(len(name)) + name) + 8 + len(name) + at
        whole[start : start + len(data)] = data
        (folder / "model.gguf").write_bytes(whole)

    u64 = struct.Struct("<Q").pack
    return edit


def cases() -> Iterator[Case]:
    """Yield the cases."""
    yield from _tensors()
    yield from _headers()
    yield from _bins()
    yield from _ggufs()
