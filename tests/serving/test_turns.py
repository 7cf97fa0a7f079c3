"""Turns run one after the other in the thread that has the model."""

import threading
from itertools import chain

import pytest

from mlx_clex import bundled, load
from mlx_clex.serving.conversation import Conversation
from mlx_clex.serving.turns import Turns


@pytest.fixture
def turns():
    def conversation():
        model, tokenizer = load(bundled.MODELS["gene"])
        return Conversation(model, tokenizer, max_tokens=4000, prefill_step_size=8)

    turns = Turns(lambda: conversation)
    yield turns
    turns.close()


def test_an_answer_that_nobody_takes_stops(turns):
    """A page that was reloaded left it running, and later turns waited for its end."""
    conversation = turns.conversation
    answer = turns.run(lambda _: conversation.answer("And the king"))
    given = [piece for _ in range(3) for piece in next(answer)]
    answer.close()

    def later(_):
        stopped = conversation.finish, conversation.generated
        conversation.max_tokens = 6
        yield stopped
        yield from conversation.answer("And the queen")

    (finish, generated), *pieces = chain(*turns.run(later))
    assert finish == "stopped"
    assert len(given) <= generated < 4000
    assert conversation.messages[1]["content"].startswith("".join(given))
    assert (len(pieces), conversation.finish) == (6, "length")


def test_reading_that_nobody_waits_for_stops(turns):
    """Nothing of the document stays, as after the button to stop."""
    conversation = turns.conversation

    def reading(tell):
        yield conversation.read(bundled.text()[:50_000], lambda *read: tell(read))

    reads = turns.run(reading)
    done, total = next(reads)[-1]
    assert 0 <= done < total
    reads.close()
    assert list(turns.run(lambda _: iter([conversation.context().tokens]))) == [[0]]


def test_a_slow_caller_gets_all_that_has_come(turns):
    """A page drew every token, and no longer heard the button to stop after some pages of text."""
    asked = threading.Event()

    def job(tell):
        yield 0
        assert asked.wait(60)
        tell(1)
        yield 2
        raise ValueError("at the end")

    steps = turns.run(job)
    assert next(steps) == [0]
    asked.set()
    assert list(turns.run(lambda _: iter([3]))) == [[3]]  # behind it
    assert next(steps) == [1, 2]
    with pytest.raises(ValueError, match="at the end"):
        next(steps)
