"""Describe what a conversion would read, rename, drop and write.

Tensors that differ only in their layer number share one line.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlx_clex.checkpoint.safetensors_file import TensorInfo, info_of
from mlx_clex.scaling import PREFIX

from .decide import Outcome
from .read.source import Checkpoint


def describe(
    checkpoint: Checkpoint,
    headers: Mapping[Path, Mapping[str, TensorInfo]],
    outcome: Outcome,
    target: Path,
) -> str:
    """Return the text that --dry-run prints.

    Args:
        checkpoint: the source.
        headers: names, types and shapes in each of its files.
        outcome: what would be written.
        target: the folder that would be made.

    Returns:
        Several lines; nothing is evaluated or written.
    """
    infos = {name: info for header in headers.values() for name, info in header.items()}
    lines = [f"read {checkpoint.folder} ({checkpoint.kind})"]
    for file, header in headers.items():
        lines.append(f"  {file.name}: {len(header)} tensors, {file.stat().st_size:,} bytes")
    renaming = outcome.renaming
    lines.append(f"rename (names of: {renaming.naming.name})")
    for ours, theirs in renaming.scaling.items():
        lines.append(f"  {_grouped(theirs)[0]} -> {ours}, float32")
    moved = _grouped(name for name in renaming.kept if name not in outcome.tensors)
    made = _grouped(name for name in outcome.tensors if name not in infos and _is_mapped(name))
    if made:
        lines += [f"  {', '.join(moved)}", f"    -> {', '.join(made)}"]
    lines.append("drop")
    dropped = _grouped(renaming.dropped) + ([] if made else moved)
    lines += [f"  {name}" for name in dropped] or ["  nothing"]
    total = sum(info_of(array).nbytes for array in outcome.tensors.values())
    lines.append(f"write {target}: {len(outcome.tensors)} tensors, {total:,} bytes")
    rows: dict[str, list[str]] = {}
    for name, array in outcome.tensors.items():
        info = info_of(array)
        key = f"{_pattern(name)} {info.dtype} {list(info.shape)}"
        rows.setdefault(key, []).append(name)
    lines += [f"  {key}" + (f" x {len(n)}" if len(n) > 1 else "") for key, n in rows.items()]
    lines.append(f"rope_scaling {outcome.config.get('rope_scaling')}, reach {outcome.reach} tokens")
    return "\n".join(lines)


def describe_download(sizes: Mapping[str, int]) -> str:
    """Return the text that --dry-run prints for a hub id.

    The tensors are not known before the download.

    Args:
        sizes: name -> bytes of the files that would be fetched.
    """
    lines = [f"download {len(sizes)} files, {sum(sizes.values()):,} bytes"]
    lines += [f"  {name}: {size:,} bytes" for name, size in sizes.items()]
    return "\n".join([*lines, "The folder of a download as --hf-path shows its tensors too."])


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".N", name)


def _grouped(names: Iterable[str]) -> list[str]:
    """Return the names with N for each number, without repeats, in order."""
    return list(dict.fromkeys(_pattern(name) for name in names))


def _is_mapped(name: str) -> bool:
    """Return whether the family's `sanitize` made a new name, not the scaling or -q."""
    return not name.startswith(PREFIX) and not name.endswith((".scales", ".biases"))
