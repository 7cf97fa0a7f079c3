"""The licence that a checkpoint's card names."""

import pytest
from mlx_clex.convert.write.card import licence_of


@pytest.mark.parametrize(
    ("licence", "expected"),
    [("apache-2.0", "apache-2.0"), ("[a, b]", None), ("[" * 20_000 + "]" * 20_000, None)],
)
def test_only_a_plain_name_is_taken(tmp_path, licence, expected):
    """Lists within lists ended the conversion in a RecursionError."""
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    assert licence_of(tmp_path) == expected
