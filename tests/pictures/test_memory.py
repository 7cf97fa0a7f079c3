"""Peak memory against length."""

from mlx_clex.pictures.memory import draw_memory


def test_each_run_and_both_limits_are_drawn(tmp_path, figures, named, legend):
    """In GB, with what MLX can use and what the machine has."""
    lines = {"reading": [(512, 1e9), (1024, 2e9)], "training": [(512, 4e9), (1024, 16e9)]}
    draw_memory(lines, tmp_path / "a.png", "A model", usable=12e9, memory=16e9)
    (axes,) = figures[0].axes
    shown = named(axes)
    assert shown["reading"] == [[512, 1], [1024, 2]]
    assert shown["what MLX can use"] == [[0, 12], [1, 12]]
    assert legend(axes) == ["training", "reading", "what MLX can use", "memory of the machine"]
