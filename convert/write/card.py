"""Write the model card: source, scales and reach."""

import re
from pathlib import Path

from huggingface_hub.repocard import metadata_load

from mlx_clex.errors import InputError, reading
from mlx_clex.scaling import Scaling

_ROWS = 16  # rows of the table of scales


def write_card(
    folder: Path,
    *,
    name: str,
    source: str,
    base_model: str | None,
    licence: str | None = None,
    scaling: Scaling | None,
    method: str,
    frozen: float | None = None,
    library: str = "mlx",
) -> None:
    """Write README.md.

    Args:
        folder: the folder to write to.
        name: title of the card and name to load: a hub id or a folder.
        source: the source of the conversion, in words.
        base_model: hub id of the source, where it has one.
        licence: licence of the source, as the hub spells it, or None.
        scaling: the model's scaling, or None where it has no mlx_clex scaling.
        method: name of the scaling, such as "clex".
        frozen: the fixed scale of a frozen export, or None.
        library: library that loads the folder, as the hub names it.
    """
    front = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    front += ["tags:", f"- {library}"]
    if scaling is not None and frozen is None:
        front.append("- mlx-clex")
    if base_model:
        front.append(f"base_model: {base_model}")
    if licence:
        front.append(f"license: {licence}")
    lines = [*front, "---", "", f"# {name}", ""]
    if base_model:
        source = f"[{base_model}](https://huggingface.co/{base_model})"
    if scaling is None:
        lines += [f"Converted to MLX from {source}, with its rotary embedding as published."]
    elif frozen is not None:
        lines += _frozen_text(source, scaling, method, frozen)
    else:
        lines += _scaled_text(source, scaling, method, name)
    lines += [
        "",
        f"Licence: {licence or 'the licence of the source, whose card does not name one'}.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def licence_of(folder: Path) -> str | None:
    """Return the licence that the card in a checkpoint folder names, or None."""
    file = folder / "README.md"
    if not file.is_file():
        return None
    try:
        with reading("The card does not load"):
            licence = (metadata_load(file) or {}).get("license")
    except (InputError, OSError):
        return None
    # Only a plain name: other text could add lines to the new card.
    plain = isinstance(licence, str) and re.fullmatch(r"[\w.+-]{1,64}", licence)
    return licence if plain else None


def scale_table(scaling: Scaling) -> list[tuple[int, int, float]]:
    """Return the ranges of lengths that share a scale.

    Returns:
        Rows of (first length, last length, scale), both in tokens, up to the reach; at
        most 16 of them, the first ones and the last.
    """
    end = scaling.reach or scaling.trained_length
    rows: list[tuple[int, int, float]] = []
    start = 1
    while start <= end:
        scale = scaling.scale_at(start)
        last = _last_with(scaling, scale, start, end)
        if len(rows) < _ROWS - 1 or last == end:
            rows.append((start, last, scale))
        start = last + 1
    return rows


def _last_with(scaling: Scaling, scale: float, low: int, high: int) -> int:
    """Return the longest length up to `high` with this scale; scales never fall."""
    while low < high:
        middle = (low + high + 1) // 2
        if scaling.scale_at(middle) == scale:
            low = middle
        else:
            high = middle - 1
    return low


def _scaled_text(source: str, scaling: Scaling, method: str, model: str) -> list[str]:
    end = "Longer sequences are refused." if scaling.hard_reach else "Longer ones still run."
    rows = scale_table(scaling)
    lines = [
        f"Converted to MLX from {source}, with {method} position scaling by mlx_clex.",
        "",
        f"Trained length: {scaling.trained_length:,} tokens. "
        f"Reach: {(scaling.reach or scaling.trained_length):,} tokens. {end}",
        "",
        "| length of the sequence, tokens | scale |",
        "|---|---|",
    ]
    for index, (first, last, scale) in enumerate(rows):
        if index and first != rows[index - 1][1] + 1:
            lines.append("| ... | ... |")
        lines.append(f"| {first:,} to {last:,} | {scale:g} |")
    return [
        *lines,
        "",
        "## Use",
        "",
        "```bash",
        "pip install mlx-clex",
        f"mlx_clex generate --model {model} --prompt hello",
        "```",
        "",
        "With mlx_clex installed, mlx-lm's programs also run it, with `--trust-remote-code`.",
    ]


def _frozen_text(source: str, scaling: Scaling, method: str, scale: float) -> list[str]:
    length = round(scale * scaling.trained_length)  # as in its config
    return [
        f"Made from {source} by mlx_clex, with {method} position scaling fixed at scale "
        f"{scale:g}. Stock programs run it without mlx_clex.",
        "",
        f"Trained length: {scaling.trained_length:,} tokens. Made for sequences of "
        f"{length:,} tokens; shorter sequences may get better answers from the unfrozen model.",
    ]
