"""The figures that a test saves."""

import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved in a test."""
    saved = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)
        # Measured here, where the picture's own font sizes hold.
        figure.boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def texts_of(figure):
    """Return all texts that are shown; ticks only within the limits."""
    found = []
    for child in figure.get_children():
        parts = child.get_children() if isinstance(child, Axes) else [child]
        for part in parts if child.get_visible() else []:
            if isinstance(part, Axis):
                low, high = sorted(part.get_view_interval())
                ticks = [tick for tick in part.get_major_ticks() if low <= tick.get_loc() <= high]
                found += [part.label, *(tick.label1 for tick in ticks)]
            else:
                found += part.findobj(Text)
    return [text for text in found if text.get_text() and text.get_visible()]


@pytest.fixture
def named():
    """A function: the points of the lines of axes that have a name."""

    def points(axes):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        return {name: its for name, its in lines.items() if not name.startswith("_")}

    return points


@pytest.fixture
def legend():
    """A function: the names in the legend of axes, from top to bottom."""
    return lambda axes: [text.get_text() for text in axes.get_legend().get_texts()]
