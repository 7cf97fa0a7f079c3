"""Facts found by length and depth."""

import math

import numpy as np

from mlx_clex.pictures.draw import draw

from .rows import LENGTHS, answers, results


def test_passkeys_by_length_and_depth(tmp_path, figures):
    """Depth down, length across, the number in the cell; what was not measured is empty."""
    rows = [row for row in answers() if (row["label"], row["length"]) != ("clex", 2048)]
    rows[0] |= {"accuracy": 0.7}
    draw(results("passkey", rows), tmp_path / "a.png")
    base, clex, bar = figures[0].axes
    title = "Task passkey: facts found by base and clex, 10 trials in each cell"
    assert figures[0].get_suptitle().replace("\n", " ") == title
    assert [axes.get_title("left") for axes in (base, clex)] == ["base", "clex"]
    cells = base.images[0].get_array()
    assert cells.tolist() == [[70, 0, 0, 0, 0], [100, 0, 0, 0, 0], [100, 0, 0, 0, 0]]
    assert [text.get_text() for text in base.texts] == [f"{cell:.0f}" for cell in cells.flat]
    assert np.isnan(clex.images[0].get_array().filled(math.nan)[:, 4]).all()
    assert clex.patch.get_hatch()
    assert [t.get_text() for t in clex.get_xticklabels()] == [f"{n:,}" for n in LENGTHS]
    assert [t.get_text() for t in base.get_yticklabels()] == ["0", "50", "100"]
    assert base.lines[0].get_xdata()[0] == 0.5  # after the first length, the trained one
    assert bar.get_ylabel() == "Facts found, %"


def test_panels_of_several_tasks_name_their_task(tmp_path, figures):
    """A panel of each task and model."""
    draw(results("passkey", answers(("words", "kv"))), tmp_path / "a.png")
    titles = [axes.get_title("left") for axes in figures[0].axes[:4]]
    assert titles == ["words: base", "words: clex", "kv: base", "kv: clex"]


def test_the_lowest_panel_of_each_column_has_the_lengths(tmp_path, figures):
    """With three panels in two columns the second had ticks without numbers."""
    rows = answers(("words", "kv"))[: -len(answers()) // 2]
    draw(results("passkey", rows), tmp_path / "a.png")
    shown = [axes for axes in figures[0].axes[:-1] if axes.get_visible()]
    figures[0].draw_without_rendering()
    labelled = [bool([t for t in a.get_xticklabels() if t.get_visible()]) for a in shown]
    assert labelled == [False, True, True]
