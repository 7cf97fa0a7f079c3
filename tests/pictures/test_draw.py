"""Pictures of result files show what they were given, and can be read."""

import struct
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import pytest

from mlx_clex.errors import InputError
from mlx_clex.evaluation.results import Results, open_results
from mlx_clex.pictures.draw import draw, picture
from mlx_clex.pictures.style import check_path

from .rows import DRAWN, perplexities


@pytest.mark.parametrize("kind", DRAWN)
def test_pictures_can_be_read(tmp_path, figures, kind):
    """A picture of 40 pixels; texts that are cut off, or over each other."""
    DRAWN[kind](tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert all(300 < side < 3000 for side in struct.unpack(">II", png[16:24]))
    assert 5_000 < len(png) < 500_000
    (figure,) = figures
    assert len(figure.boxes) > 10
    page = figure.bbox.padded(1)
    for text, box in figure.boxes:
        assert page.contains(box.x0, box.y0), f"{text!r} is cut off"
        assert page.contains(box.x1, box.y1), f"{text!r} is cut off"
    for (text, box), (other, its) in combinations(figure.boxes, 2):
        width = min(box.x1, its.x1) - max(box.x0, its.x0)
        height = min(box.y1, its.y1) - max(box.y0, its.y0)
        assert min(width, height) < 2, f"{text!r} is over {other!r}"


@pytest.mark.parametrize("kind", ["perplexity", "frequencies"])
def test_svg_by_the_suffix(tmp_path, kind):
    """The same picture is the same file, so that a repository sees no change in it."""
    for name in ("a.svg", "b.SVG"):
        DRAWN[kind](tmp_path / name)
    svg = (tmp_path / "a.svg").read_bytes()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
    assert svg == (tmp_path / "b.SVG").read_bytes()


@pytest.mark.parametrize(
    ("given", "path", "match"),
    [
        (Results("evaluate", {}, (), [{"label": "a"}]), "a.png", "no picture of evaluate results"),
        (Results("passkey", {}, (), []), "a.png", "no rows"),
        (Results("passkey", {}, (), [{"label": "a", "task": "kv"}]), "a.png", "lack accuracy, dep"),
        (
            Results("perplexity", {}, (), perplexities()),
            "a.jpg",
            r"\.png or \.svg file, not 'a.jpg",
        ),
    ],
)
def test_what_cannot_be_drawn(tmp_path, given, path, match):
    """One line, and no file."""
    with pytest.raises(InputError, match=match):
        draw(given, tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Measuring must not fail because a picture cannot be drawn: one line says what to install."""
    measured = open_results(tmp_path / "out", kind="perplexity", settings={}, keys=("length",))
    for row in perplexities():
        measured.add(row)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    picture(measured)
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'mlx-clex[plot]'" in line
    assert not (tmp_path / "out.png").exists()
    with pytest.raises(InputError, match="plot"):
        check_path(tmp_path / "out.png")


def test_a_picture_beside_its_results(tmp_path):
    """PREFIX.png, and nothing for results in memory."""
    measured = open_results(tmp_path / "out-0.5", kind="perplexity", settings={}, keys=("length",))
    picture(measured)
    assert not (tmp_path / "out-0.5.png").exists()
    for row in perplexities():
        measured.add(row)
    picture(measured)
    assert (tmp_path / "out-0.5.png").stat().st_size > 5_000
    picture(Results("perplexity", {}, (), perplexities()))
