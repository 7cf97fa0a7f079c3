"""Peak memory against length, a line for each run that was planned."""

from collections.abc import Mapping
from pathlib import Path

from .style import Points, add_legend, draw_lines, saved, set_ticks


def draw_memory(
    lines: Mapping[str, Points], path: Path, title: str, *, usable: float, memory: float
) -> None:
    """Draw the peak of each run by length, and the memory of the machine.

    Args:
        lines: name of a run -> (tokens, bytes).
        path: the file to write; .png or .svg.
        title: the model and the machine.
        usable: bytes that MLX can use.
        memory: bytes of the machine.
    """
    with saved(path, title, height=4.2) as figure:
        axes = figure.subplots()
        points = {name: [(x, y / 1e9) for x, y in its] for name, its in lines.items()}
        drawn = draw_lines(axes, points)
        marks = [
            axes.axhline(usable / 1e9, color="0.3", linewidth=1, label="what MLX can use"),
            axes.axhline(
                memory / 1e9, color="0.3", linewidth=1, linestyle=":", label="memory of the machine"
            ),
        ]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        set_ticks(axes.xaxis, sorted({x for its in points.values() for x, _ in its}))
        axes.set_xlabel("Length, tokens")
        axes.set_ylabel("Peak memory, GB")
        add_legend(axes, drawn, marks)
