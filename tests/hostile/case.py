"""A hostile case: what it starts from, how it is broken, and how commands must end.

Not covered: running cases (`trial.py`).
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REFUSED, FINE = 2, 0
BOTH = ("generate", "convert")
ALL = ("generate", "convert", "doctor")

Data = bytes | str | Callable[[], bytes]  # of a file; a function makes what is large
Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> (dtype, shape, data)

# What each command is; CASE is the broken folder, the others are whole ones of the trial.
COMMANDS: dict[str, tuple[list[str], str]] = {
    "generate": (["generate", "--model", "CASE", "--prompt", "hi", "--max-tokens", "2"], ""),
    "convert": (["convert", "--hf-path", "CASE", "--mlx-path", "written"], ""),
    "freeze": (["convert", "--hf-path", "CASE", "--mlx-path", "written", "--freeze", "4"], ""),
    "freeze-gguf": (
        [
            *("convert", "--hf-path", "CASE", "--mlx-path", "written"),
            *("--freeze", "4", "--for", "llama.cpp"),
        ],
        "",
    ),
    "doctor": (["doctor", "CASE"], ""),
    "chat": (["chat", "--model", "CASE", "--max-tokens", "2"], "hi\n"),
    "frequencies": (["plot", "frequencies", "--model", "CASE"], ""),
    "measure": (["perplexity", "--model", "CASE", "--data", "TEXT", "--lengths", "32"], ""),
    "gguf": (["generate", "--model", "CASE/model.gguf", "--prompt", "hi", "--max-tokens", "2"], ""),
    "gguf-convert": (["convert", "--hf-path", "CASE/model.gguf", "--mlx-path", "written"], ""),
    "gguf-doctor": (["doctor", "CASE/model.gguf"], ""),
    "adapters": (
        [
            "generate",
            "--model",
            "OURS",
            "--adapter-path",
            "CASE",
            "--prompt",
            "hi",
            "--max-tokens",
            "2",
        ],
        "",
    ),
    "fuse": (["fuse", "--model", "OURS", "--adapter-path", "CASE", "--save-path", "written"], ""),
    "cache": (
        [
            "generate",
            "--model",
            "OURS",
            "--prompt-cache-file",
            "CASE/cache.safetensors",
            "--prompt",
            "hi",
            "--max-tokens",
            "2",
        ],
        "",
    ),
    "cache-alone": (
        [
            "generate",
            "--prompt-cache-file",
            "CASE/cache.safetensors",
            "--prompt",
            "hi",
            "--max-tokens",
            "2",
        ],
        "",
    ),
    "restore": (
        ["chat", "--model", "OURS", "--max-tokens", "2"],
        "hello\n/restore CASE/talk.safetensors\n/context\nhi\n",
    ),
    "picture": (["plot", "extrapolation", "CASE/results.json"], ""),
    "log": (["plot", "training", "CASE"], ""),
    "go-on": (
        [
            "perplexity",
            "--model",
            "OURS",
            "--data",
            "TEXT",
            "--lengths",
            "32",
            "--windows",
            "5",
            "--output",
            "CASE/results",
        ],
        "",
    ),
    "yaml": (["lora", "-c", "CASE/run.yaml"], ""),
    "train": (
        [
            "lora",
            "--model",
            "OURS",
            "--data",
            "CASE",
            "--train",
            "--iters",
            "1",
            "--batch-size",
            "1",
            "--max-seq-length",
            "32",
            "--val-batches",
            "1",
            "--steps-per-eval",
            "1",
            "--num-layers",
            "1",
            "--adapter-path",
            "written",
        ],
        "",
    ),
    "resume": (
        [
            "lora",
            "--resume",
            "--model",
            "OURS",
            "--data",
            "DATA",
            "--train",
            "--iters",
            "2",
            "--batch-size",
            "1",
            "--max-seq-length",
            "32",
            "--val-batches",
            "1",
            "--num-layers",
            "1",
            "--adapter-path",
            "CASE",
        ],
        "",
    ),
    "text": (
        ["perplexity", "--model", "OURS", "--data", "CASE", "--lengths", "32", "--windows", "5"],
        "",
    ),
    "prompt": (
        [
            "generate",
            "--model",
            "OURS",
            "--prompt-file",
            "CASE/prompt.txt",
            "--prompt",
            "hi",
            "--max-tokens",
            "2",
        ],
        "",
    ),
    "fill-cache": (
        [
            "cache_prompt",
            "--model",
            "OURS",
            "--prompt-file",
            "CASE/prompt.txt",
            "--prompt-cache-file",
            "written",
        ],
        "",
    ),
}


@dataclass(frozen=True)
class Case:
    """One broken folder."""

    kind: str  # the table that it is of
    name: str
    base: str  # the whole folder that it begins as; "" for an empty one
    edit: Callable[[Path], object]
    commands: tuple[str, ...] = BOTH
    status: int = REFUSED  # of every command that `other` does not name
    other: Mapping[str, int] = field(default_factory=dict)
    changes: bool = False  # an answer may be another one than the usual

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"

    def expected(self, command: str) -> int:
        """Return the exit status that a command must have."""
        return self.other.get(command, self.status)


def config(file: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    """Return an edit that sets keys of a JSON object; `...` deletes one."""

    def edit(folder: Path) -> None:
        path = folder / file
        entries = json.loads(path.read_text()) if path.exists() else {}
        for name, value in changes.items():
            if value is ...:
                entries.pop(name, None)
            else:
                entries[name] = value
        path.write_text(json.dumps(entries))

    return edit


def inside(key: str, file: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    """Return an edit that sets keys of an object within a JSON object."""

    def edit(folder: Path) -> None:
        entries = json.loads((folder / file).read_text())
        entries[key] = {k: v for k, v in {**entries[key], **changes}.items() if v is not ...}
        (folder / file).write_text(json.dumps(entries))

    return edit


def put(name: str, data: Data) -> Callable[[Path], None]:
    """Return an edit that replaces a file."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(_bytes(data))

    return edit


def sparse(name: str, size: int, start: bytes = b"") -> Callable[[Path], None]:
    """Return an edit that makes a file of this size, of zeros that take no space."""

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)

    return edit


def linked(name: str, target: str) -> Callable[[Path], None]:
    """Return an edit that replaces a file by a link; OUTSIDE is the folder of secrets."""

    def edit(folder: Path) -> None:
        path = folder / name
        if path.is_file() or path.is_symlink():
            path.unlink()
        outside = folder.parent.parent / "outside"
        path.symlink_to(target.replace("OUTSIDE", str(outside)))

    return edit


def piped(name: str) -> Callable[[Path], None]:
    """Return an edit that replaces a file by a named pipe."""

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def made_folder(name: str) -> Callable[[Path], None]:
    """Return an edit that replaces a file by a folder."""

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return edit


def gone(*names: str) -> Callable[[Path], None]:
    """Return an edit that deletes files."""

    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def both(*edits: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return an edit that does several."""

    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = entry["dtype"], entry["shape"], data[8 + size :][begin:end]
    return tensors, metadata


def write_safetensors(path: Path, tensors: Tensors, metadata: Any = None) -> None:
    """Write a safetensors file; nothing is checked."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())
    )


def tensors(
    change: Callable[[Tensors], object], file: str = "model.safetensors"
) -> Callable[[Path], None]:
    """Return an edit that changes the tensors of a safetensors file."""

    def edit(folder: Path) -> None:
        found, metadata = read_safetensors(folder / file)
        change(found)
        write_safetensors(folder / file, found, metadata)

    return edit


def header(
    change: Callable[[dict[str, Any]], object], file: str = "model.safetensors"
) -> Callable[[Path], None]:
    """Return an edit that changes the header of a safetensors file, and not its data."""

    def edit(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + size])
        changed = change(entries)
        text = json.dumps(entries if changed is None else changed).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return edit


def raw_header(text: Data, file: str = "model.safetensors") -> Callable[[Path], None]:
    """Return an edit that writes a safetensors file with this text as its header."""

    def data() -> bytes:
        header = _bytes(text)
        return struct.pack("<Q", len(header)) + header

    return put(file, data)


def many(count: int) -> Callable[[], bytes]:
    """Return a function that makes a header of empty tensors."""
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return lambda: b"{" + b",".join(entry % number for number in range(count)) + b"}"


def _bytes(data: Data) -> bytes:
    data = data() if callable(data) else data
    return data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data


def floats(value: float, count: int) -> bytes:
    """Return equal float32 numbers as bytes."""
    return struct.pack("<f", value) * count


def deep(depth: int = 100_000, opening: str = "[", closing: str = "]") -> str:
    """Return nested JSON lists."""
    return opening * depth + closing * depth
