"""Stop strings cut a text in the same place however the text is divided."""

import random

import pytest

from mlx_clex.data.stop_strings import StopStrings, cut


@pytest.mark.parametrize(
    ("text", "strings", "expected"),
    [
        ("when the people came", ["people"], "when the "),
        ("the colour", ["lo"], "the co"),
        ("peopeople", ["people"], "peo"),
        ("a peo", ["people"], "a peo"),
        ("one\n\ntwo", ["\n\n", "e\n\n"], "on"),  # both end there
        ("abc", ["abc", "b"], "a"),  # "b" is complete first
        ("aab", ["b", "ab"], "a"),
        ("Käse und Öl", ["Ö"], "Käse und "),
        ("stop", ["stop"], ""),
        ("", ["x"], ""),
        ("as it is", [], "as it is"),
    ],
)
def test_a_text_ends_before_its_first_stop_string(text, strings, expected):
    """A stop string inside a token was deleted from the text, and the text went on."""
    assert cut(text, strings) == expected
    for seed in range(20):
        rng = random.Random(seed)
        stops, out, left = StopStrings(strings), "", text
        while left and not stops.found:
            size = rng.randint(0, 3)
            out += stops.add(left[:size])
            left = left[size:]
            assert expected.startswith(out), "text was passed on that belongs to a stop string"
        assert out + stops.end() == expected
        assert stops.found == (expected != text)
        assert stops.add("more") == ("" if stops.found else "more")


def test_no_more_text_is_held_back_than_may_become_a_stop_string():
    """A stream that waits for the end of a sentence is no stream."""
    stops = StopStrings(["###"])
    assert [stops.add(piece) for piece in ("a", "#", "#b", "c#")] == ["a", "", "##b", "c"]
    assert stops.end() == "#"
