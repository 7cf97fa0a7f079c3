"""Measure the perplexities that a table lacks, and print it.

Not covered: which models and lengths are measured (`candidates.py`), and the files of results.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from tqdm import tqdm

from ..data.corpus import Corpus
from ..model.scaled_model import scaled
from .candidates import Candidate, Loader
from .intervals import paired_ratio
from .perplexity import Protocol, Score, score
from .results import Results

SMALLEST_WINDOWS = 8  # smallest default number of windows
AIMED_TOKENS = 16_384  # tokens of all windows that the default number of windows aims at
SAME_TARGETS = "same-targets"


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How the perplexities of a table are measured."""

    protocol: str = SAME_TARGETS  # or whole, chunked or sliding
    targets: int | None = None  # tokens at the end of each window that count, for same-targets
    chunk: int | None = None  # tokens, for chunked; None: the trained length of each model
    stride: int | None = None  # tokens, for sliding; None: a quarter of the length
    windows: int | None = None  # largest number of windows of each length; None: by length
    kv_bits: int | None = None  # bits of the KV cache; None: not quantised
    kv_group_size: int = 64  # values of the KV cache that share a quantisation scale

    def chunk_of(self, line: Candidate) -> int | None:
        """Return the tokens of a chunk, or None for other protocols."""
        return self.chunk or line.trained_length if self.protocol == "chunked" else None

    def protocol_of(self, line: Candidate, length: int) -> Protocol:
        """Return the protocol of one cell."""
        if self.protocol == "chunked":
            return Protocol(chunk=self.chunk_of(line))
        if self.protocol == SAME_TARGETS:
            return Protocol(targets=self.targets)
        if self.protocol == "sliding":
            return Protocol(stride=self.stride or max(1, length // 4))
        return Protocol()

    def windows_of(self, length: int, longest: int) -> int:
        """Return the largest number of windows of one length."""
        if self.protocol == SAME_TARGETS:
            # Only a few tokens of a window count, so there are more windows.
            return self.windows or max(SMALLEST_WINDOWS, 2 * AIMED_TOKENS // longest)
        return self.windows or max(SMALLEST_WINDOWS, AIMED_TOKENS // length)


def measure(
    measuring: Measuring,
    loader: Loader,
    results: Results,
    corpus: Corpus,
    lengths: Sequence[int],
    lines: Sequence[Candidate],
    *,
    show: Callable[[str], Any],
) -> list[dict[str, Any]]:
    """Measure the rows that the results lack, print the table and return all rows.

    Args:
        measuring: how each cell is measured.
        loader: loads the models; the last one stays in memory.
        results: where each row is stored as soon as it is measured.
        corpus: the text.
        lengths: lengths of the windows, tokens, shortest first.
        lines: the models.
        show: prints a line.
    """
    width = max(len(line.label) for line in lines)
    show(f"Protocol {measuring.protocol}: {corpus.name}, {len(corpus.tokens)} tokens.")
    if (corpus.ends - corpus.starts).max() < lengths[-1]:
        show(f"No text has {lengths[-1]} tokens, so all texts are joined end to end.")
    if any(line.entry for line in lines):
        show("MODEL + SCALING: inference-time scaling only; the weights are unchanged.")
    paired = measuring.protocol == SAME_TARGETS
    ratio = f"{f'/ at {lengths[0]}':>11}   {'95 % interval':17} " if paired else ""
    show(
        f"{'model':{width}} {'tokens':>8} {'scale':>7} {'windows':>8} {'scored':>7} "
        f"{'perplexity':>11}   {'95 % interval':17} {ratio}".rstrip()
    )
    cells = [(line, length) for line in lines for length in lengths]
    missing = [
        (line, length)
        for line, length in cells
        if not results.find(label=line.label, length=length)
    ]
    with tqdm(
        total=sum(_tokens_to_read(measuring, corpus, *cell, lengths[-1]) for cell in missing),
        unit="tok",
        unit_scale=True,
        leave=False,
        disable=None,
    ) as bar:
        rows = []
        for line, length in cells:
            row = results.find(label=line.label, length=length)
            if row is None:
                bar.set_description(f"{line.label}, {length} tokens")
                model = loader.with_scaling(line.path, line.entry)
                found = score(
                    model,
                    corpus,
                    length,
                    measuring.windows_of(length, lengths[-1]),
                    measuring.protocol_of(line, length),
                    lengths[-1],
                    kv_bits=measuring.kv_bits,
                    kv_group_size=measuring.kv_group_size,
                    on_read=bar.update,
                )
                row = _row(model, line, length, found, corpus.name)
                if paired:
                    shortest = results.find(label=line.label, length=lengths[0]) or {}
                    row |= _paired(found, shortest.get("losses", found.losses))
                results.add(row)
            rows.append(row)
            show(_text(row, width))
    if len(lines) > 1:
        show("\nPerplexity by length, in tokens:")
        show(f"{'':{width}}" + "".join(f" {length:>9}" for length in lengths))
        for line in lines:
            mine = [row["perplexity"] for row in rows if row["label"] == line.label]
            show(f"{line.label:{width}}" + "".join(f" {_number(value, 9)}" for value in mine))
    return rows


def _tokens_to_read(
    measuring: Measuring, corpus: Corpus, line: Candidate, length: int, longest: int
) -> int:
    protocol = measuring.protocol_of(line, length)
    places = protocol.starts(corpus, length, measuring.windows_of(length, longest), longest)
    return len(places) * (length - 1)  # the last token is not read


def _row(model: nn.Module, line: Candidate, length: int, found: Score, text: str) -> dict[str, Any]:
    low, high = found.interval or (None, None)
    return {
        "label": line.label,
        "text": text,
        "inference_time": line.entry is not None,
        "trained_length": line.trained_length,
        "reach": line.reach,
        "length": length,
        "scale": scaled(model).scale_at(length),
        "windows": len(found.losses),
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "low": low,
        "high": high,
        "model": line.model,
    }


def _paired(found: Score, shortest: Sequence[float]) -> dict[str, Any]:
    """Return the columns that compare a row with that of the shortest length."""
    ratio = paired_ratio(found.losses.tolist(), shortest)
    low, high = ratio.interval or (None, None)
    return {
        "losses": found.losses.tolist(),
        "ratio": ratio.value,
        "ratio_low": low,
        "ratio_high": high,
    }


def _text(row: Mapping[str, Any], width: int) -> str:
    text = (
        f"{row['label']:{width}} {row['length']:>8} {row['scale']:>7g} {row['windows']:>8} "
        f"{row['tokens']:>7} {_number(row['perplexity'], 11)}   "
        f"{_interval(row['low'], row['high'], '.4g')}"
    )
    if "ratio" in row:
        ratio = _interval(row["ratio_low"], row["ratio_high"], ".3f")
        text += f" {_number(row['ratio'], 11)}   {ratio}"
    return text.rstrip()


def _interval(low: float | None, high: float | None, digits: str) -> str:
    text = "" if low is None or high is None else f"{low:{digits}} .. {high:{digits}}"
    return f"{text:17}"


def _number(value: float | None, width: int) -> str:
    # Three digits are enough for a perplexity that large.
    return (
        f"{'nan' if value is None else f'{value:.4f}' if value < 1e4 else f'{value:.3g}':>{width}}"
    )
