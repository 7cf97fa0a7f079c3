"""Check the target folder of a conversion, and write weights in shards."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_clex.checkpoint.files import new_folder, write_json
from mlx_clex.checkpoint.safetensors_file import array_bytes, info_of, write
from mlx_clex.errors import InputError
from mlx_clex.model.finite import check_sum


def check_target(target: Path) -> None:
    """Refuse a target that exists or cannot be written.

    Raises:
        InputError: the message has the reason.
    """
    if not target.name:
        raise InputError("The folder to write needs a name.")
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already: delete it, or give another folder.")
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file, so {target} cannot be made: give another folder.")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} cannot be written to: give another folder.")


def check_space(target: Path, needed: int) -> None:
    """Refuse a conversion that does not fit on the disk.

    Args:
        target: the folder to write.
        needed: size of the conversion, in bytes.

    Raises:
        InputError: less space is free.
    """
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"The conversion needs {needed / 1e9:.2f} GB in {existing}, but only "
            f"{free / 1e9:.2f} GB are free. Free some space, or give another folder."
        )


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    Raises:
        InputError: the folder cannot be made, or another process has made the target.
    """
    try:
        with new_folder(target) as temporary:
            yield temporary
            check_target(target)
    except PermissionError as error:
        raise InputError(
            f"{target.parent} cannot be written to ({error.strerror}). Give another folder."
        ) from error


def write_weights(
    folder: Path,
    tensors: dict[str, mx.array],
    unquantised: dict[str, mx.array],
    *,
    shard_bytes: int,
    file_format: str,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the tensors in shards, each evaluated, written and freed in turn.

    Args:
        folder: the folder to write to.
        tensors: lazy arrays; emptied while writing.
        unquantised: what some of them are quantised from; emptied, too.
        shard_bytes: largest size of a file, unless one tensor is larger.
        file_format: "mlx" or "pt".
        advance: called after each tensor with its size in bytes.

    Raises:
        InputError: a tensor has values that are not finite.
    """
    infos = {name: info_of(array) for name, array in tensors.items()}
    shards = _split({name: info.nbytes for name, info in infos.items()}, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = [(name, infos[name], _taker(tensors, unquantised, name)) for name in names]
        write(folder / file, entries, file_format, advance)
        weight_map.update(dict.fromkeys(names, file))
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / "model.safetensors.index.json", index)


def finite_bytes(name: str, array: mx.array, source: mx.array | None = None) -> memoryview:
    """Evaluate an array and return a view of its bytes, if its values are finite.

    Args:
        name: of the tensor, for messages.
        array: the array; integers are not checked.
        source: what it was quantised from, checked in its place: quantising hides NaN.

    Raises:
        InputError: values are NaN or infinite.
    """
    source = array if source is None else source
    if not mx.issubdtype(source.dtype, mx.floating):
        return array_bytes(array)
    total: Any = source.sum().astype(mx.float32)
    data = array_bytes(array, total)
    check_sum(name, source, total.item())
    return data


def _taker(
    tensors: dict[str, mx.array], unquantised: dict[str, mx.array], name: str
) -> Callable[[], memoryview]:
    def take() -> memoryview:
        mx.clear_cache()  # free the work memory of the last tensor
        return finite_bytes(name, tensors.pop(name), unquantised.pop(name, None))

    return take


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
