"""A parser under test, and Hypothesis's strategies for what it is given.

Most inputs are whole ones with some values replaced by others of any type.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlx_clex.errors import InputError, RunError, one_line

# What a field may have in place of what it should have.
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "clex", "yarn", "llama", "a" * 300, "\ud800", "\x1b[2J", "\u0665", "NaN"]),
    st.text(max_size=8),
    st.sampled_from([1 << 31, 1 << 63, 10**400, 1e308, -0.0]),
)
VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
BYTES = st.binary(max_size=200)


def objects(whole: dict[str, Any], more: tuple[str, ...] = ()) -> st.SearchStrategy[Any]:
    """Return objects that are like a whole one, with some values replaced or gone."""
    keys = st.sampled_from([*whole, *more])
    changes = st.dictionaries(keys, st.one_of(VALUES, st.just(...)), max_size=4)
    return changes.map(lambda new: {k: v for k, v in {**whole, **new}.items() if v is not ...})


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """Return bytes that are like these, with some replaced, or an end cut off."""
    places = st.lists(st.tuples(st.integers(0, min(len(data), 3000) - 1), BYTES), max_size=4)

    def change(drawn: tuple[list[tuple[int, bytes]], int]) -> bytes:
        new = bytearray(data)
        for at, piece in drawn[0]:
            new[at : at + len(piece)] = piece
        return bytes(new[: drawn[1]] if drawn[1] < len(data) else new)

    return st.tuples(places, st.integers(0, 2 * len(data))).map(change)


@dataclass
class Target:
    """A parser, what it is given, and how many inputs it gets of 100,000."""

    name: str
    inputs: st.SearchStrategy[Any]
    parse: Callable[[Any], object]
    share: int
    taken: int = 0
    refused: int = 0

    def __call__(self, value: Any) -> None:
        """Parse an input.

        Raises:
            AssertionError: the input is refused with more than one line.
            Exception: any other is a fault as well.
        """
        try:
            self.parse(value)
        except (InputError, RunError) as error:
            self.refused += 1
            line = one_line(error)
            assert line.isprintable() or "\x1b" not in line, line
            return
        self.taken += 1

    def test(self, count: int, *, derandomize: bool = False) -> Any:
        """Return a test of Hypothesis over this many inputs; it raises what the parser raises."""

        @settings(
            max_examples=count,
            deadline=None,
            derandomize=derandomize,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(self.inputs)
        def check(value: Any) -> None:
            try:
                self(value)
            except Exception as error:
                error.add_note(f"The input was {value!r}")
                raise

        return check

    def fault(self, test: Callable[[], object]) -> str | None:
        """Run a test, and return what it raised, or None."""
        try:
            test()
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            return f"{type(error).__name__}: {error}"[:400] + f" {notes[:1500]}"
        return None
