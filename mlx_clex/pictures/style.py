"""The look that all pictures share, their axes and legends, and how they are saved.

Each line has a colour, a dash pattern and a marker of its own, so that a picture can be read in
black and white. The suffix of the path, .png or .svg, decides the format. matplotlib, the extra
`plot`, is imported when the first picture is drawn. Figures are made without pyplot, so they
need no display.

Not covered: what a picture shows (the other files of this folder).
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.files import new_file
from ..errors import InputError, import_extra

Row = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

FORMATS = (".png", ".svg")
WIDTH = 7.2  # inches, of most pictures
_LETTERS = 13  # of a title, in an inch
# Inches: a row of a legend, the gap after an entry, and all above and below the axes.
_ROW, _GAP, _MARGINS = 0.15, 0.07, 1.0
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
    "figure.labelsize": 10,
    "figure.titlesize": 10,
    "font.size": 9,
    "grid.color": "0.9",
    "legend.frameon": False,
    "legend.handlelength": 4,  # as long as the longest dash pattern
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.hashsalt": "mlx_clex",  # the same picture is the same file
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
# Colours for colour-blind readers (after Okabe and Ito), dash patterns, and markers.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#AA4499", "#8A6D00", "#3A9BD9")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (6, 2, 1.5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)),
    (0, (10, 3)),
    (0, (3, 1.5)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def look(index: int, *, marker: bool = True) -> dict[str, Any]:
    """Return the colour, dashes and marker of a line; the first 49 lines all differ."""
    other = (index + index // len(_COLOURS)) % len(_COLOURS)
    found = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _DASHES[other]}
    return found | {"marker": _MARKERS[other]} if marker else found


def check_path(path: Path) -> None:
    """Refuse a path that cannot be drawn to, before the work of measuring; make its folder.

    Raises:
        InputError: another suffix, a folder that cannot be made, or matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"A picture is a {' or '.join(FORMATS)} file, not {path.name!r}.")
    import_extra("matplotlib.figure", "plot", "A picture")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): give another --output."
        ) from error


@contextmanager
def saved(path: Path, title: str, height: float, width: float = WIDTH) -> Iterator[Any]:
    """Yield a figure to draw into, and write it at the end.

    Args:
        path: the file to write; .png or .svg.
        title: the text and the models that the picture is of.
        height: inches.
        width: inches.

    Raises:
        InputError: see `check_path`; or the file cannot be written.
    """
    check_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE), _writing(path), new_file(path) as unfinished:
        figure = Figure(figsize=(width, height))
        lines = textwrap.fill(title, int(_LETTERS * width))
        figure.suptitle(lines, x=0.01, horizontalalignment="left", parse_math=False)
        yield figure
        dated = path.suffix.lower() == ".svg"
        figure.savefig(unfinished, metadata={"Date": None} if dated else None)


def title_of(rows: Iterable[Row], what: str) -> str:
    """Return "TEXT: what", where the rows name their text."""
    texts = dict.fromkeys(row["text"] for row in rows if row.get("text"))
    return f"{listed(texts)}: {what}" if texts else what[:1].upper() + what[1:]


def listed(names: Iterable[str]) -> str:
    """Return "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def draw_lines(axes: Any, points: Mapping[str, Points]) -> list[Any]:
    """Draw a line for each name, each with its own look, and return the lines."""
    return [
        axes.plot(*columns(its), label=name, **look(index))[0]
        for index, (name, its) in enumerate(points.items())
    ]


def add_legend(
    axes: Any, lines: Sequence[Any], marks: Sequence[Any] = (), *, above: bool = False
) -> None:
    """Name the lines beside the axes, in the order of their right ends from top to bottom.

    Args:
        axes: where the lines are drawn.
        lines: lines with labels; lines without a point are left out.
        marks: other handles with labels, for the end of the legend.
        above: put the legend above the axes, in a row, which leaves them the full width.
    """
    ends = {line: [y for y in line.get_ydata() if math.isfinite(y)] for line in lines}
    shown = sorted(filter(ends.get, lines), key=lambda line: -ends[line][-1])
    handles = [*shown, *marks]
    labels = [textwrap.fill(handle.get_label(), 40 if above else 26) for handle in handles]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1.03)}
    if above:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(handles)}
    legend = axes.legend(handles, labels, **place)
    if not above:
        rows = sum(label.count("\n") + 1 for label in labels)
        needed = (_MARGINS + _ROW * rows + _GAP * len(labels)) * len(axes.figure.axes)
        axes.figure.set_figheight(max(axes.figure.get_figheight(), needed))
    for text in legend.get_texts():
        text.set_parse_math(False)
    for text, line in zip(legend.get_texts(), shown, strict=False):
        text.set_color(line.get_color())


def log_axis(axes: Any) -> None:
    """Put the vertical axis on a logarithmic scale whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = (1, 1.5, 2, 3, 5, 7) if high / low < 30 else (1, 2, 5) if high / low < 1000 else (1,)
    few = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10])
    axes.yaxis.set_major_locator(few if high / low < 3 else LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def set_ticks(axis: Any, values: Sequence[float]) -> None:
    """Put ticks at these values; at every second or third one where there are many."""
    from matplotlib.ticker import NullLocator

    shown = values[:: -(-len(values) // 9)]
    axis.set_ticks(shown, [f"{value:,.10g}" for value in shown])
    axis.set_minor_locator(NullLocator())


def columns(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the points as columns, two where there are none."""
    return [list(column) for column in zip(*points, strict=True)] or [[], []]


def finite(points: Iterable[tuple[float, Any]]) -> list[tuple[float, float]]:
    """Return the points whose value is a finite number."""
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]
