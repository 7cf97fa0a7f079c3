"""Pictures show the figures they were given, and can be read."""

import math
import struct
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text

from mlx_clex.errors import InputError
from mlx_clex.evaluation.results import Results, open_results
from mlx_clex.pictures.draw import draw, picture
from mlx_clex.pictures.frequencies import draw_frequencies
from mlx_clex.pictures.style import check_path
from mlx_clex.pictures.training import draw_training
from mlx_clex.scaling import SCALINGS, build_scaling

LENGTHS = (128, 256, 512, 1024, 2048)
DEPTHS = (0.0, 0.5, 1.0)
REACHES = {"base": 128, "base + ntk 4": 512, "clex": 2048, "a $name$ of_theirs": None}


def perplexities():
    return [
        {
            "label": label,
            "text": "a book",
            "trained_length": 128,
            "reach": reach,
            "length": length,
            "scale": length / 128,
            "windows": 4,
            "tokens": 4 * length,
            "perplexity": 5.0 + (length - 128) / (reach or 4096),
            "low": 4.5,
            "high": 5.5 + length / 64,
        }
        for label, reach in REACHES.items()
        for length in LENGTHS
    ]


def answers(tasks=("passkey",)):
    return [
        {
            "task": task,
            "label": label,
            "length": length,
            "depth": depth,
            "trials": 10,
            "correct": 10 * (length <= reach),
            "accuracy": float(length <= reach),
            "trained_length": 128,
        }
        for task in tasks
        for label, reach in (("base", 128), ("clex", 2048))
        for length in LENGTHS
        for depth in DEPTHS
    ]


def differences():
    return [
        {
            "first": first,
            "last": 2 * first - 1,
            "tokens": 100,
            "kl": 0.1 * index + 0.1,
            "flips": 0.025 * index,
            "perplexity_a": 5.0 + index,
            "perplexity_b": 6.0 + index,
            "text": "a book",
            "model_a": "models/one",
            "model_b": "models/two",
        }
        for index, first in enumerate((16, 32, 64))
    ]


def log(iterations=60):
    for iteration in range(1, iterations + 1):
        yield {"iteration": iteration, "loss": 5 - iteration / iterations, "scale": 2.0}
        if iteration % 20 == 0:
            by_length = {"128": 90.0 + iteration, "4096": 95.0 + iteration}
            yield {"iteration": iteration, "valid_loss": 4.5, "perplexity": by_length}


def scaling(name, **entry):
    shape = {"dims": 16, "base": 10_000.0, "trained_length": 32, "heads": 2, "layers": 2}
    made = build_scaling({"type": name, **entry}, **shape)
    for index, tensor in enumerate(made.learned):
        made[tensor] = made[tensor] + 0.02 * (index + 1)
    return made


ROWS = {"perplexity": perplexities, "passkey": answers, "compare": differences}
DRAWN = {
    **{kind: partial(lambda kind, path: draw(results(kind), path), kind) for kind in ROWS},
    "tasks": lambda path: draw(Results("passkey", {}, (), answers(("words", "kv", "n"))), path),
    "training": lambda path: draw_training(list(log()), path),
    "frequencies": lambda path: draw_frequencies(
        {"mine": scaling("clex"), "another": scaling("gene")}, path
    ),
}


def results(kind, rows=None):
    return Results(kind, {}, (), ROWS[kind]() if rows is None else rows)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved in a test."""
    saved = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)
        # Measured here, where the picture's own sizes of letters hold.
        figure.boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def lines_of(axes):
    """Points of the lines that have a name."""
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    return {name: points for name, points in lines.items() if not name.startswith("_")}


@pytest.mark.parametrize("kind", DRAWN)
def test_pictures_can_be_read(tmp_path, figures, kind):
    """A picture of 40 pixels; names of lines that end at one place, over each other."""
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


def texts_of(figure):
    """All texts that are shown: of its ticks those within the limits."""
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


@pytest.mark.parametrize("kind", ["perplexity", "frequencies"])
def test_svg_by_the_suffix(tmp_path, kind):
    """The same picture is the same file, so that a repository sees no change in it."""
    for name in ("a.svg", "b.SVG"):
        DRAWN[kind](tmp_path / name)
    svg = (tmp_path / "a.svg").read_bytes()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
    assert svg == (tmp_path / "b.SVG").read_bytes()


def test_perplexity_by_length(tmp_path, figures):
    """Every row is on its line; bands, reach and trained length are marked."""
    draw(results("perplexity"), tmp_path / "a.png")
    (axes,) = figures[0].axes
    rows = perplexities()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert lines_of(axes) == {
        label: [[r["length"], r["perplexity"]] for r in rows if r["label"] == label]
        for label in REACHES
    }
    assert [t.get_text() for t in axes.get_xticklabels()] == ["128", "256", "512", "1,024", "2,048"]
    bands = [part.get_paths()[0].vertices[:, 1] for part in axes.collections]
    assert all(band.min() == 4.5 and band.max() == 5.5 + 32 for band in bands)
    assert len(bands) == len(REACHES)
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    past = [list(line.get_xdata()) for line in hollow]
    assert axes.get_xlabel().splitlines()[1] == "Bands: 95 % intervals. Hollow: beyond the reach."
    assert past == [[256, 512, 1024, 2048], [1024, 2048], [], []]
    names = {text.get_text() for text in axes.texts}
    assert names == {"trained\n128", "reach\n512", "reach\n2,048"}
    # From the highest end to the lowest, as the lines end on the right.
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    ends = {label: points[-1][1] for label, points in lines_of(axes).items()}
    assert legend == sorted(ends, key=ends.get, reverse=True)
    assert axes.get_title("left") == "Perplexity of a book, by length"


def test_what_is_no_number_is_left_out(tmp_path, figures):
    """A perplexity beyond all floats is kept as None."""
    rows = perplexities()
    rows[1] |= {"perplexity": None}
    rows[2] |= {"low": None}
    draw(results("perplexity", rows), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert [x for x, _ in lines_of(axes)["base"]] == [128, 512, 1024, 2048]
    assert set(axes.collections[0].get_paths()[0].vertices[:, 0]) == {128, 1024, 2048}


def test_passkeys_by_length_and_depth(tmp_path, figures):
    """Depth down, length across, the number in the cell; what was not measured is empty."""
    rows = [row for row in answers() if (row["label"], row["length"]) != ("clex", 2048)]
    rows[0] |= {"accuracy": 0.7}
    draw(results("passkey", rows), tmp_path / "a.png")
    base, clex, bar = figures[0].axes
    assert [axes.get_title("left") for axes in (base, clex)] == [
        "passkey: base",
        "passkey: clex",
    ]
    cells = base.images[0].get_array()
    assert cells.tolist() == [[70, 0, 0, 0, 0], [100, 0, 0, 0, 0], [100, 0, 0, 0, 0]]
    assert [text.get_text() for text in base.texts] == [f"{cell:.0f}" for cell in cells.flat]
    assert np.isnan(clex.images[0].get_array().filled(math.nan)[:, 4]).all()
    assert clex.patch.get_hatch()
    assert [t.get_text() for t in clex.get_xticklabels()] == [f"{n:,}" for n in LENGTHS]
    assert [t.get_text() for t in base.get_yticklabels()] == ["0", "50", "100"]
    assert base.lines[0].get_xdata()[0] == 0.5  # after the first length, the trained one
    assert bar.get_ylabel() == "Right answers, % of 10 trials"


def test_two_models_by_position(tmp_path, figures):
    """Each bucket from its first token to its last."""
    draw(results("compare"), tmp_path / "a.png")
    top, middle, bottom = figures[0].axes
    for axes, heights in ((top, [0.1, 0.2, 0.3]), (middle, [0, 2.5, 5])):
        values, edges, _ = axes.patches[0].get_data()
        assert np.allclose(values, heights)
        assert list(edges) == [16, 32, 64, 128]
    assert [list(line.get_ydata()) for line in bottom.lines] == [[5, 6, 7, 7], [6, 7, 8, 8]]
    assert (bottom.get_xscale(), top.get_yscale(), middle.get_yscale()) == ("log",) * 3
    assert [text.get_text() for text in bottom.get_legend().get_texts()] == ["two", "one"]
    assert top.get_title("left") == "one against two, on a book"


@pytest.mark.parametrize(("iterations", "window"), [(60, 1), (300, 6)])
def test_a_training_run(tmp_path, figures, iterations, window):
    """Every loss, their running mean where there are many, and validation by length."""
    lines = list(log(iterations))
    draw_training(lines, tmp_path / "a.png")
    losses, by_length = figures[0].axes
    all_losses = [[row["iteration"], row["loss"]] for row in lines if "loss" in row]
    assert losses.lines[0].get_xydata().tolist() == all_losses
    *_, mean, valid = losses.lines
    assert mean.get_xydata()[0].tolist() == pytest.approx(
        [(window + 1) // 2, np.mean([loss for _, loss in all_losses[:window]])]
    )
    assert valid.get_xydata().tolist() == [[n, 4.5] for n in range(20, iterations + 1, 20)]
    assert lines_of(by_length) == {
        f"{length} tokens": [[n, start + n] for n in range(20, iterations + 1, 20)]
        for length, start in (("128", 90.0), ("4,096", 95.0))
    }


def test_a_run_without_validation(tmp_path, figures):
    """One panel."""
    draw_training(
        [{"iteration": 1, "loss": 3.0}, {"iteration": 2, "loss": math.nan}], tmp_path / "a.png"
    )
    (axes,) = figures[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 3]]


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_of_every_method(tmp_path, figures, name):
    """What the model has, beside where it began: CLEX at NTK-aware scaling by 2t - 1."""
    what = scaling(name)
    draw_frequencies({"mine": what}, tmp_path / "a.png", max_scale=8)
    left, right = figures[0].axes
    tables = np.array([line.get_ydata() for line in left.lines]).reshape(2, 8, -1)
    scales = left.lines[0].get_xdata()
    heads = [np.array(what.inv_freq(8.0, layer)).reshape(-1, 8) for layer in (0, 1)]
    mine = np.median(np.concatenate(heads), axis=0)
    assert scales[0] == 1
    assert scales[-1] == 8
    assert np.allclose(tables[0, :, -1], mine)
    i = np.arange(0, 16, 2)
    base = 10_000.0 ** -(i / 16)
    t = scales[:, None]
    ntk = base * (2 * t - 1) ** -(i / 14) if name == "clex" else base * t ** -(i / 14)
    if name != "gene-param":
        assert np.allclose(tables[1], ntk.T, rtol=1e-5)
    first = next(iter(lines_of(right).values()))
    assert np.allclose([y for _, y in first], mine / (base * 8.0 ** -(i / 14)), rtol=1e-4)
    assert right.get_ylabel() == "Inverse frequency / that of NTK at t, t = 8"


def test_a_scale_beyond_the_reach(tmp_path):
    """CLEX has no frequencies there."""
    with pytest.raises(InputError, match=r"within 1\.\.16"):
        draw_frequencies({"mine": scaling("clex")}, tmp_path / "a.png", max_scale=17)


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


def test_a_log_without_losses(tmp_path):
    """A run that has just begun."""
    with pytest.raises(InputError, match="no losses"):
        draw_training([], tmp_path / "a.png")


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Measuring must not fail for want of a picture: one line says what to install."""
    measured = open_results(tmp_path / "out", kind="perplexity", settings={}, keys=("length",))
    for row in perplexities():
        measured.add(row)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    picture(measured)
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'mlx_clex[plot]'" in line
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
