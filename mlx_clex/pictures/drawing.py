"""Pictures of results, of learned frequencies and of a training run.

Every line has a style and a marker of its own and its name at its end, every cell its number,
so that a picture says the same in black and white. The suffix of the path, .png or .svg,
decides the format. matplotlib, the extra `plot`, is imported when the first picture is drawn;
its figures are made without pyplot, so no display is needed and no state is left behind.

Not covered: measuring (the commands), and result files (`results.py`).
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..evaluation.results import Results
from ..scaling import SCALINGS, Scaling

Row = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

FORMATS = (".png", ".svg")
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 160,
    "font.size": 9,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.hashsalt": "mlx_clex",  # the same picture is the same file
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
# Colours that colour-blind readers tell apart (after Okabe and Ito); without colour, the rest.
_LOOKS: tuple[tuple[str, Any, str], ...] = (
    ("#000000", "-", "o"),
    ("#0072B2", (0, (6, 2)), "s"),
    ("#D55E00", (0, (6, 2, 1.5, 2)), "^"),
    ("#009E73", (0, (1.5, 1.5)), "D"),
    ("#AA4499", (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)), "v"),
    ("#8A6D00", (0, (10, 3)), "P"),
    ("#3A9BD9", (0, (3, 1.5)), "X"),
)
_LINE_HEIGHT = 11  # of a name beside a line, points


def picture(results: Results) -> None:
    """Draw results beside their files, as PREFIX.png; nothing where they have no files.

    Without matplotlib one line on stderr says what to install.
    """
    path = results.path(".png")
    if path is None or not results.rows:
        return
    try:
        draw(results, path)
    except InputError as error:
        print(f"[mlx_clex] No picture: {error}", file=sys.stderr)


def draw(results: Results, path: Path) -> None:
    """Draw results as their kind is drawn.

    Args:
        results: of the kind perplexity, passkey or compare.
        path: the file to write; .png or .svg.

    Raises:
        InputError: another kind, no rows, columns that are missing, another suffix, or no
            matplotlib.
    """
    if results.kind not in _FIGURES:
        raise InputError(
            f"There is no picture of {results.kind} results, only of {', '.join(_FIGURES)}."
        )
    if not results.rows:
        raise InputError("The results have no rows to draw yet.")
    figure_of, columns = _FIGURES[results.kind]
    missing = {column for row in results.rows for column in columns if column not in row}
    if missing:
        raise InputError(f"The {results.kind} results lack {', '.join(sorted(missing))}.")
    with _saved(path) as figure:
        figure_of(figure, results)


def draw_frequencies(scalings: Mapping[str, Scaling], path: Path, max_scale: float = 0) -> None:
    """Draw how fast every pair turns at every scale, a row of panels a model.

    Left, the inverse frequency of every pair along the scale; right, how far every pair is
    slowed at the largest scale. Beside what the model has learned, what it had started from.

    Args:
        scalings: by the names to show.
        path: the file to write; .png or .svg.
        max_scale: the largest scale, target length / trained length; 0 takes each model's
            reach, or 16 where it has none.

    Raises:
        InputError: a scale out of range, another suffix, or no matplotlib.
    """
    largest = {name: max_scale or _largest_scale(scaling) for name, scaling in scalings.items()}
    for name, scaling in scalings.items():
        if scaling.hard_reach:
            scaling.check_scale(largest[name])
    with _saved(path) as figure:
        figure.set_size_inches(8, 3.4 * len(scalings))
        grid = figure.subplots(len(scalings), 2, squeeze=False, width_ratios=(10, 9))
        for (left, right), (name, scaling) in zip(grid, scalings.items(), strict=True):
            _every_pair(left, name, scaling, largest[name])
            _slowed(right, scaling, largest[name])


def draw_training(log: Sequence[Row], path: Path) -> None:
    """Draw the loss of a run, and below it the perplexity by length where it was measured.

    Args:
        log: lines of a training log, as `training.log` describes them.
        path: the file to write; .png or .svg.

    Raises:
        InputError: there is nothing to draw, another suffix, or no matplotlib.
    """
    if not any(line.keys() & {"loss", "valid_loss"} for line in log):
        raise InputError("The log has no losses to draw yet.")
    by_length = _perplexity_by_length(log)
    with _saved(path) as figure:
        figure.set_size_inches(7.2, 6 if by_length else 3.4)
        panels = figure.subplots(2 if by_length else 1, 1, sharex=True, squeeze=False)[:, 0]
        _losses(panels[0], log)
        if by_length:
            lines = _lines(panels[1], by_length)
            panels[1].set_ylabel("Perplexity")
            panels[1].set_title("Validation, by length")
            _log_axis(panels[1])
            _name_ends(panels[1], lines)
        panels[-1].set_xlabel("Iteration")


def check_path(path: Path) -> None:
    """Refuse what could not be drawn, before the work of measuring.

    Raises:
        InputError: another suffix, or no matplotlib.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"A picture is a {' or '.join(FORMATS)} file, not {path.name!r}.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Pictures are drawn by matplotlib, which is missing: pip install 'mlx_clex[plot]'."
        ) from error


@contextmanager
def _saved(path: Path) -> Iterator[Any]:
    """A figure to draw into, written at the end."""
    check_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure()
        yield figure
        dated = path.suffix.lower() == ".svg"
        figure.savefig(path, metadata={"Date": None} if dated else None)


# --- perplexity by length


def _extrapolation(figure: Any, results: Results) -> None:
    """Perplexity against length, a line a label; hollow markers are past its reach."""
    figure.set_size_inches(7.2, 4.3)
    axes = figure.subplots()
    by_label: dict[str, list[Row]] = {}
    for row in sorted(results.rows, key=lambda row: row["length"]):
        mine = by_label.setdefault(row["label"], [])
        if row["perplexity"] is not None:
            mine.append(row)
    points = {
        label: [(row["length"], row["perplexity"]) for row in rows]
        for label, rows in by_label.items()
    }
    lines = _lines(axes, points)
    for label, line in lines.items():
        rows = by_label[label]
        hollow = [
            (row["length"], row["perplexity"])
            for row in rows
            if row["reach"] is not None and row["length"] > row["reach"]
        ]
        axes.plot(
            *_columns(hollow),
            linestyle="none",
            marker=line.get_marker(),
            color=line.get_color(),
            markerfacecolor="white",
        )
        band = [(row["length"], row["low"], row["high"]) for row in rows]
        band = [part for part in band if None not in part]
        if band:
            axes.fill_between(*_columns(band), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    lengths = sorted({row["length"] for row in results.rows})
    _plain_ticks(axes.xaxis, lengths)
    marks, note = [], ""
    if any(None not in (row["low"], row["high"]) for row in results.rows):
        marks.append("Bands: 95 % intervals.")
    if any(row["reach"] is not None and row["length"] > row["reach"] for row in results.rows):
        marks.append("Hollow: beyond the reach.")
    if any(row.get("inference_time") for row in results.rows):
        note = "MODEL + SCALING: inference-time scaling only"
    axes.set_xlabel("\n".join(filter(None, ["Length, tokens", " ".join(marks), note])))
    axes.set_ylabel(f"Perplexity, protocol {results.settings.get('protocol', 'whole')}")
    _log_axis(axes)
    _mark_lengths(axes, results.rows)
    _name_ends(axes, lines)


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at these values; at every second or third one where there are many."""
    from matplotlib.ticker import NullLocator

    shown = values[:: -(-len(values) // 9)]
    axis.set_ticks(shown, [f"{value:,.10g}" for value in shown])
    axis.set_minor_locator(NullLocator())


def _mark_lengths(axes: Any, rows: Iterable[Row]) -> None:
    """Vertical lines at trained length and reach, with their names above the axes."""
    low, high = axes.get_xlim()
    reaches = {row["reach"]: ("reach", ":") for row in rows if row["reach"] is not None}
    trained = {row["trained_length"]: ("trained", "--") for row in rows}
    for where, (name, style) in (reaches | trained).items():
        if where is None or not low <= where <= high:
            continue
        axes.axvline(where, color="0.4", linewidth=1, linestyle=style, zorder=1)
        axes.annotate(
            f"{name}\n{where:,}",
            (where, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color="0.25",
        )


# --- passkeys by length and depth


def _passkeys(figure: Any, results: Results) -> None:
    """Heat maps of length against depth, one a task and label."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        panels.setdefault((row["task"], row["label"]), []).append(row)
    lengths = sorted({row["length"] for row in results.rows})
    depths = sorted({row["depth"] for row in results.rows})
    width, height = max(1.6, 0.5 * len(lengths)), max(1.0, 0.28 * len(depths))
    across = min(len(panels), max(1, round(6 / width)))
    down = -(-len(panels) // across)
    figure.set_size_inches(1.6 + across * (width + 0.2), max(2.5, 0.6 + down * (height + 0.4)))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((task, label), rows) in zip(grid.flat, panels.items(), strict=False):
        image = _heat_map(axes, rows, lengths, depths)
        axes.set_title(f"{task}: {label}", parse_math=False)
    known = {row["trained_length"] for row in results.rows} - {None}
    trained = sorted(n for n in known if lengths[0] <= n < lengths[-1])
    note = f" (dashed: trained at {' and '.join(f'{n:,}' for n in trained)})" if trained else ""
    figure.supxlabel(f"Length, tokens{note}", fontsize=10)
    figure.supylabel("Depth, % of the length", fontsize=10)
    trials = sorted({row["trials"] for row in results.rows})
    count = "-".join(str(n) for n in dict.fromkeys((trials[0], trials[-1])))
    of = "1 trial" if count == "1" else f"{count} trials"
    figure.colorbar(image, ax=grid, label=f"Right answers, % of {of}", pad=0.02)


def _heat_map(axes: Any, rows: Sequence[Row], lengths: list[int], depths: list[float]) -> Any:
    cells = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        cells[depths.index(row["depth"]), lengths.index(row["length"])] = 100 * row["accuracy"]
    axes.patch.set(facecolor="0.9", hatch="///", edgecolor="0.7")  # where nothing was measured
    image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (line, column), value in np.ndenumerate(cells):
        if not math.isnan(value):
            colour = "white" if value > 55 else "black"
            axes.text(column, line, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    trained = rows[0]["trained_length"] or 0
    inside = sum(length <= trained for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside - 0.5, color="white", linewidth=2.5)
        axes.axvline(inside - 0.5, color="black", linestyle="--")
    return image


# --- two models on one text


def _comparison(figure: Any, results: Results) -> None:
    """Divergence, changed choices and both perplexities, by position in the text."""
    figure.set_size_inches(7.2, 6)
    rows = sorted(results.rows, key=lambda row: row["first"])
    edges = [*(row["first"] for row in rows), rows[-1]["last"] + 1]
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for axes, column, factor, name in (
        (top, "kl", 1, "KL divergence,\nnats per token"),
        (middle, "flips", 100, "Other most likely\ntoken, %"),
    ):
        values = [math.nan if row[column] is None else factor * row[column] for row in rows]
        axes.stairs(values, edges, color="black", linewidth=1.6)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    lines = {}
    for (name, column), (colour, style, _) in zip(
        (("A", "perplexity_a"), ("B", "perplexity_b")), _LOOKS, strict=False
    ):
        values = [math.nan if row[column] is None else row[column] for row in rows]
        # The last value once more, so that the last bucket is drawn as wide as it is.
        (lines[name],) = bottom.plot(
            edges, [*values, values[-1]], drawstyle="steps-post", color=colour, linestyle=style
        )
    bottom.set_ylabel("Perplexity")
    names = [f"{which.upper()}: {rows[0].get(f'model_{which}')}" for which in "ab"]
    bottom.set_xlabel("\n".join(["Position in the text, tokens", *names]), parse_math=False)
    _log_axis(bottom)
    _name_ends(bottom, lines)


# --- frequencies


def _largest_scale(scaling: Scaling) -> float:
    reach = scaling.reach or 0
    return reach / scaling.trained_length if reach > scaling.trained_length else 16.0


def _frequencies(scaling: Scaling, scale: float) -> np.ndarray:
    """Radians per token, (D/2,); where layers and heads have their own, the median."""
    layers = range((scaling.shape.layers or 1) if scaling.by_layer else 1)
    found = np.stack([np.array(scaling.inv_freq(scale, layer)) for layer in layers])
    return np.median(found.reshape(-1, found.shape[-1]), axis=0)


def _compared(scaling: Scaling) -> dict[str, Scaling]:
    """The scaling, what its training began with, and NTK-aware scaling, by their names."""
    shape = vars(scaling.shape)
    name = scaling.name
    ntk = {"NTK at t": SCALINGS["ntk"](**shape)}
    if not scaling.learned:
        return {name: scaling} | ntk
    fresh = type(scaling)(scaling.config, **shape)
    return {f"{name}, learned": scaling, f"untrained: {scaling.untrained}": fresh} | ntk


def _every_pair(axes: Any, name: str, scaling: Scaling, largest: float) -> None:
    scales = np.geomspace(1, largest, 65)
    for what, (colour, style, _) in zip(_compared(scaling).values(), _LOOKS[:2], strict=False):
        table = np.stack([_frequencies(what, float(scale)) for scale in scales])
        axes.plot(scales, table, color=colour, linestyle=style, linewidth=0.8)
    heads = ", median of all heads" if scaling.by_layer else ""
    axes.set_title(name + heads, parse_math=False)
    axes.set_xscale("log", base=2)
    _plain_ticks(axes.xaxis, [2.0**n for n in range(int(math.log2(largest)) + 1)])
    axes.set_xlabel("Scale t, target length / trained length")
    axes.set_yscale("log")
    axes.set_ylabel("Inverse frequency, radians per token")


def _slowed(axes: Any, scaling: Scaling, largest: float) -> None:
    """How many times slower every pair turns at the largest scale than in the base model."""
    base = scaling.base ** -(np.arange(0, scaling.dims, 2) / scaling.dims)
    points = {
        name: list(enumerate(base / _frequencies(what, largest), 1))
        for name, what in _compared(scaling).items()
    }
    for line in _lines(axes, points).values():
        line.set_markevery(max(1, len(base) // 16))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("Pair of dimensions, from the fastest")
    axes.set_ylabel(f"Times slower at t = {largest:g} than trained")
    _log_axis(axes)
    # Beside the name of the model, which is over the other panel and keeps the room.
    legend = axes.legend(
        loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=len(points), columnspacing=1.2
    )
    legend.set_in_layout(False)


# --- training


def _losses(axes: Any, log: Sequence[Row]) -> None:
    """Loss of every iteration, its running mean, and that of validation."""
    steps = _finite((line["iteration"], line.get("loss")) for line in log)
    window = max(1, len(steps) // 50)
    if window > 1:
        axes.plot(*_columns(steps), color="0.75", linewidth=0.8)
        means = np.convolve(_columns(steps)[1], np.ones(window) / window, "valid")
        middle = steps[(window - 1) // 2 :]
        steps = [(step, mean) for (step, _), mean in zip(middle, means, strict=False)]
    valid = _finite((line["iteration"], line.get("valid_loss")) for line in log)
    lines = {}
    if steps:
        (lines["training"],) = axes.plot(*_columns(steps), color=_LOOKS[0][0])
    if valid:
        colour, style, marker = _LOOKS[1]
        (lines["validation"],) = axes.plot(
            *_columns(valid), color=colour, linestyle=style, marker=marker
        )
    mean = f", mean of {window} iterations" if window > 1 else ""
    axes.set_title(f"Loss{mean}")
    axes.set_ylabel("Nats per token")
    _name_ends(axes, lines)


def _perplexity_by_length(log: Sequence[Row]) -> dict[str, Points]:
    found: dict[str, list[tuple[float, Any]]] = {}
    for line in log:
        for length, value in (line.get("perplexity") or {}).items():
            found.setdefault(f"{int(length):,} tokens", []).append((line["iteration"], value))
    return {name: _finite(points) for name, points in found.items()}


# --- lines and their names


def _lines(axes: Any, points: Mapping[str, Points]) -> dict[str, Any]:
    """Draw a line for each name, each with a look of its own."""
    lines = {}
    for index, (name, its) in enumerate(points.items()):
        colour, style, marker = _LOOKS[index % len(_LOOKS)]
        (lines[name],) = axes.plot(
            *_columns(its), color=colour, linestyle=style, marker=marker, label=name
        )
    return lines


def _columns(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*points, strict=True)] or [[], []]


def _finite(points: Iterable[tuple[float, Any]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _log_axis(axes: Any) -> None:
    """A vertical axis on a log scale whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,))
    axes.yaxis.set_major_locator(
        MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]) if high / low < 5 else ticks
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _name_ends(axes: Any, lines: Mapping[str, Any]) -> None:
    """Write each line's name beside its end, none over another."""
    axes.figure.draw_without_rendering()  # decides where on the page the axes are
    box, point = axes.get_window_extent(), axes.figure.dpi / 72
    ends = []
    for name, line in lines.items():
        if len(line.get_xdata()):
            end = line.get_xdata()[-1], line.get_ydata()[-1]
            ends.append((axes.transData.transform(end)[1], name, line.get_color(), end))
    ends.sort(key=lambda end: end[0])
    heights = _apart([end[0] for end in ends], _LINE_HEIGHT * point)
    for height, (_, name, colour, end) in zip(heights, ends, strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 4}
        axes.annotate(
            name,
            end,
            (1.03, (height - box.y0) / box.height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            parse_math=False,
            arrowprops=leader | {"relpos": (0, 0.5)},
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Rising positions at least `gap` apart and as near as can be, in squares, to those wanted."""
    blocks: list[tuple[float, int]] = []  # where one begins, less its gaps; how many it has
    for index, position in enumerate(wanted):
        start, count = position - index * gap, 1
        while blocks and blocks[-1][0] > start:
            other, others = blocks.pop()
            start = (start * count + other * others) / (count + others)
            count += others
        blocks.append((start, count))
    starts = [start for start, count in blocks for _ in range(count)]
    return [start + index * gap for index, start in enumerate(starts)]


# By the kind of results: what draws them, and the columns it reads.
_FIGURES: dict[str, tuple[Callable[[Any, Results], None], tuple[str, ...]]] = {
    "perplexity": (
        _extrapolation,
        ("label", "length", "perplexity", "low", "high", "trained_length", "reach"),
    ),
    "passkey": (
        _passkeys,
        ("task", "label", "length", "depth", "trials", "accuracy", "trained_length"),
    ),
    "compare": (_comparison, ("first", "last", "kl", "flips", "perplexity_a", "perplexity_b")),
}
