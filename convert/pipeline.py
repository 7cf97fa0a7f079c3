"""Convert a source into a finished folder."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from mlx_lm.utils import MAX_FILE_SIZE_GB, save_config
from tqdm import tqdm

from mlx_clex import bundled
from mlx_clex.checkpoint import safetensors_file
from mlx_clex.checkpoint.files import expand
from mlx_clex.checkpoint.folder import SHIM, check_hub_id
from mlx_clex.checkpoint.safetensors_file import MLX_TYPES, TensorInfo
from mlx_clex.checkpoint.tensor_names import rename
from mlx_clex.errors import InputError, reading, say

from .check import check_config, check_model, check_tokenizer
from .decide import Outcome, decide_outcome, scaling_weights
from .dry_run import describe, describe_download
from .freeze import gguf_export
from .options import Options
from .read import gguf_file, torch_bin
from .read.source import Checkpoint, read_folder
from .resolve import find, is_local
from .write.card import licence_of, write_card
from .write.output import check_space, check_target, whole_or_nothing, write_weights
from .write.tokenizer import write_tokenizer

_SHIM_TEXT = """\
# Lets mlx-lm load this checkpoint wherever mlx_clex is installed.
from mlx_clex.model_file import Model, ModelArgs  # noqa: F401
"""
_LIBRARIES = {"mlx-lm": "mlx", "llama.cpp": "gguf"}  # as the hub names them
_SMALL_FILES = 64_000_000  # bytes; more than tokenizer, config and card need


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    revision: str | None = None,
    upload_repo: str | None = None,
    dry_run: bool = False,
    origin: str | None = None,
    licence: str | None = None,
    **fields: Any,
) -> Path | None:
    """Convert a checkpoint to MLX, streaming.

    Args:
        hf_path: a folder, a .gguf file, a hub id, or bundled:NAME.
        mlx_path: the folder to write; it must not exist.
        revision: branch, tag or commit of a hub id.
        upload_repo: hub id to publish the result under.
        dry_run: print what would happen, and write nothing. For a hub id, print what would be
            downloaded.
        origin: the source that the card names; None: the name of the source.
        licence: licence of the source, as the hub spells it; None: the one in its card.
        fields: fields of `Options`, such as `quantize=True`.

    Returns:
        The folder written, or None for a dry run.

    Raises:
        InputError: the source, target or an option cannot be used; nothing is left behind.
        OSError: for example, the disk is full; nothing is left behind.
    """
    options = Options(**fields)
    target = expand(mlx_path)
    if not dry_run:
        check_target(target)
    if upload_repo is not None:
        from .read.hub import check_upload

        check_upload(upload_repo)
    if str(hf_path).startswith(bundled.PREFIX):
        origin = origin or str(hf_path)
        hf_path = bundled.folder(str(hf_path).removeprefix(bundled.PREFIX))
    if dry_run and not is_local(hf_path):
        from .read.hub import look_up

        print(describe_download(look_up(check_hub_id(hf_path), revision).sizes))
        return None
    source = Source(find(hf_path, revision))
    check_config(source.config)
    outcome = decide_outcome(source.config, source.weights(), options)
    for note in outcome.notes:
        say(note)
    size = source.checkpoint.files[0].stat().st_size
    if source.gguf and not options.quantize and outcome.nbytes > 1.2 * size:
        say(
            f"The source has {gguf_file.bits_per_weight(source.gguf):.1f} bits per weight. The "
            f"result is {outcome.nbytes / size:.1f} times as large. To keep it small, add -q "
            "--q-bits 4."
        )
    if dry_run:
        print(describe(source.checkpoint, source.headers, outcome, target))
        return None
    check_space(target, outcome.nbytes + source.spooled_bytes + _SMALL_FILES)
    with whole_or_nothing(target) as folder:
        card = {
            "name": upload_repo or target.name,
            "source": origin or source.checkpoint.name,
            "licence": licence or licence_of(source.checkpoint.folder),
        }
        _write(source, outcome, options, folder, card)
    say(f"Wrote {target}: {_summary(outcome, options, target)}.")
    if upload_repo is not None:
        from .read.hub import upload

        say(f"Uploaded to {upload(target, upload_repo)}.")
    return target


def _summary(outcome: Outcome, options: Options, target: Path) -> str:
    """Return a summary of the written folder: method, lengths and size."""
    parts = [f"reach {outcome.reach:,} tokens"]
    if outcome.scaling is not None:
        parts.insert(0, f"trained at {outcome.scaling.trained_length:,} tokens")
        held = "" if options.freeze is None else f" fixed at scale {options.freeze:g}"
        parts.insert(0, outcome.method + held)
    size = sum(file.stat().st_size for file in target.iterdir())
    return ", ".join([*parts, f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"])


class Source:
    """A checkpoint whose headers are read; its data is read later."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read the headers.

        Raises:
            InputError: a file is corrupt or cut off.
        """
        self.checkpoint = checkpoint
        self.gguf = gguf_file.read(checkpoint.files[0]) if checkpoint.kind == "gguf" else None
        self.config = gguf_file.config_of(self.gguf) if self.gguf else checkpoint.config
        self.headers: dict[Path, dict[str, TensorInfo]] = {}
        for file in checkpoint.files:
            if self.gguf:
                self.headers[file] = gguf_file.header(self.gguf)
            elif checkpoint.kind == "bin":
                self.headers[file] = torch_bin.read_header(file)
            else:
                self.headers[file] = safetensors_file.read_header(file)

    @property
    def spooled_bytes(self) -> int:
        """Size of the safetensors files that the source is first rewritten as, in bytes."""
        if self.is_lazy:
            return 0
        return sum(info.nbytes for header in self.headers.values() for info in header.values())

    @property
    def is_lazy(self) -> bool:
        """Whether mlx reads the data of the files only when a tensor is evaluated."""
        return self.checkpoint.kind == "safetensors"

    def weights(self) -> dict[str, mx.array]:
        """Return the tensors, lazy; zeros of the same shapes if the source must be rewritten."""
        if self.is_lazy:
            return self._in_order(self.checkpoint.files)
        return {
            name: mx.zeros(info.shape, MLX_TYPES[info.dtype])
            for header in self.headers.values()
            for name, info in header.items()
        }

    def rewrite(self, scratch: Path, names: Collection[str] | None = None) -> dict[str, mx.array]:
        """Rewrite the files as safetensors, and return their tensors, lazy.

        Args:
            scratch: a folder for the new files. Delete it only after the arrays are written.
            names: the tensors to take from .bin files; None: all.
        """
        files = []
        with tqdm(total=self.spooled_bytes, unit="B", unit_scale=True, desc="Reading") as bar:
            for number, file in enumerate(self.checkpoint.files):
                files.append(scratch / f"{number}.safetensors")
                if self.gguf:
                    gguf_file.spool(self.gguf, files[-1], bar.update)
                else:
                    torch_bin.spool(file, files[-1], bar.update, names)
        return self._in_order(files)

    def _in_order(self, files: list[Path]) -> dict[str, mx.array]:
        weights: dict[str, Any] = {}
        for file, header in zip(files, self.headers.values(), strict=True):
            try:
                loaded: Any = mx.load(str(file), format="safetensors")
            except (RuntimeError, ValueError) as error:
                raise InputError(f"{file} does not load: {error}") from error
            weights.update((name, loaded[name]) for name in header if name in loaded)
        return weights


def learned_tensors(folder: Path) -> dict[str, mx.array]:
    """Read the learned tensors of a scaling from a published or converted folder, and no others.

    Returns:
        The tensors by our names, in float32.

    Raises:
        InputError: a file is corrupt, or torch, which reads .bin files, is not installed.
    """
    source = Source(read_folder(folder))
    renaming = rename(name for header in source.headers.values() for name in header)
    with TemporaryDirectory() as scratch:
        if source.is_lazy:
            weights = source.weights()
        else:
            wanted = {name for names in renaming.scaling.values() for name in names}
            weights = source.rewrite(Path(scratch), wanted)
        found = scaling_weights(weights, renaming)
        mx.eval(found)
    return found


def _write(
    source: Source, outcome: Outcome, options: Options, folder: Path, card: dict[str, Any]
) -> None:
    checkpoint = source.checkpoint
    scratch = folder / "scratch"
    scratch.mkdir()
    # First, since it may still be found broken, and the weights take long.
    words = scratch if options.for_llama_cpp else folder
    missing = write_tokenizer(checkpoint, words, outcome.reach, source.gguf)
    if missing:
        say(missing)
    else:
        generation = checkpoint.folder / "generation_config.json"
        if generation.exists() and source.gguf is None:
            shutil.copyfile(generation, words / generation.name)
        check_tokenizer(words, outcome.config, checkpoint.name)
    tokenizer = _gguf_tokenizer(source, outcome, words) if options.for_llama_cpp else {}
    if not source.is_lazy:
        outcome = decide_outcome(source.config, source.rewrite(scratch), options)
    with tqdm(total=outcome.nbytes, unit="B", unit_scale=True, desc="Writing") as bar:
        if options.for_llama_cpp:
            file = folder / gguf_export.FILE
            gguf_export.write(
                file,
                outcome.config,
                outcome.tensors,
                tokenizer,
                name=card["name"],
                advance=bar.update,
            )
        else:
            _write_checkpoint(source, outcome, folder, bar.update)
    shutil.rmtree(scratch)
    write_card(
        folder,
        base_model=checkpoint.repo,
        scaling=outcome.scaling,
        method=outcome.method,
        frozen=options.freeze,
        library=_LIBRARIES.get(options.freeze_for, options.freeze_for),
        **card,
    )
    if not options.for_llama_cpp:
        # Last: a folder counts as a checkpoint once it has config.json.
        save_config(outcome.config, folder / "config.json")
    if outcome.file_format == "mlx" and not options.for_llama_cpp:
        check_model(folder)


def _write_checkpoint(
    source: Source, outcome: Outcome, folder: Path, advance: Callable[[int], object]
) -> None:
    largest = max(file.stat().st_size for file in source.checkpoint.files)
    write_weights(
        folder,
        outcome.tensors,
        outcome.unquantised,
        shard_bytes=min(MAX_FILE_SIZE_GB << 30, max(largest, 1 << 30)),
        file_format=outcome.file_format,
        advance=advance,
    )
    if outcome.config.get("model_file") == SHIM:
        (folder / SHIM).write_text(_SHIM_TEXT, encoding="utf-8")


def _gguf_tokenizer(source: Source, outcome: Outcome, folder: Path) -> dict[str, Any]:
    if source.gguf is not None:
        metadata = source.gguf.metadata
        return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    with reading(f"--for llama.cpp does not read the tokenizer of {source.checkpoint.name}"):
        rows = outcome.tensors["model.embed_tokens.weight"].shape[0]
        return gguf_export.tokenizer_of(folder, rows)
