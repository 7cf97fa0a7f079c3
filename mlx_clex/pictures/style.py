"""What all pictures share: their look, axes, legends, and files.

Every line has a style and a marker of its own, every cell its number, so that a picture says
the same in black and white. The suffix of the path, .png or .svg, decides the format.
matplotlib, the extra `plot`, is imported when the first picture is drawn; its figures are
made without pyplot, so no display is needed and no state is left behind.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.files import new_file
from ..errors import InputError

Row = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

FORMATS = (".png", ".svg")
STYLE: dict[Any, Any] = {
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
LOOKS: tuple[tuple[str, Any, str], ...] = (
    ("#000000", "-", "o"),
    ("#0072B2", (0, (6, 2)), "s"),
    ("#D55E00", (0, (6, 2, 1.5, 2)), "^"),
    ("#009E73", (0, (1.5, 1.5)), "D"),
    ("#AA4499", (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)), "v"),
    ("#8A6D00", (0, (10, 3)), "P"),
    ("#3A9BD9", (0, (3, 1.5)), "X"),
)


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
def saved(path: Path) -> Iterator[Any]:
    """Yield a figure to draw into, which is written when the block ends.

    Raises:
        InputError: another suffix, or no matplotlib.
    """
    check_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), new_file(path) as unfinished:
        figure = Figure()
        yield figure
        dated = path.suffix.lower() == ".svg"
        figure.savefig(unfinished, metadata={"Date": None} if dated else None)


def lines(axes: Any, points: Mapping[str, Points]) -> dict[str, Any]:
    """Draw a line for each name, each with a look of its own."""
    lines = {}
    for index, (name, its) in enumerate(points.items()):
        colour, style, marker = LOOKS[index % len(LOOKS)]
        (lines[name],) = axes.plot(
            *columns(its), color=colour, linestyle=style, marker=marker, label=name
        )
    return lines


def columns(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*points, strict=True)] or [[], []]


def finite(points: Iterable[tuple[float, Any]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def log_axis(axes: Any) -> None:
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


def legend(axes: Any, lines: Mapping[str, Any]) -> None:
    """Name the lines right of the axes, in the order of their ends, from the top."""
    with_points = {name: line for name, line in lines.items() if len(line.get_xdata())}
    ends = {name: line.get_ydata()[-1] for name, line in with_points.items()}
    names = sorted(ends, key=ends.__getitem__, reverse=True)
    handles = [with_points[name] for name in names]
    shown = axes.legend(handles, names, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in shown.get_texts():
        text.set_parse_math(False)


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at these values; at every second or third one where there are many."""
    from matplotlib.ticker import NullLocator

    shown = values[:: -(-len(values) // 9)]
    axis.set_ticks(shown, [f"{value:,.10g}" for value in shown])
    axis.set_minor_locator(NullLocator())
