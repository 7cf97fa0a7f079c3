"""Short prompts do not wait for long ones, and every answer is the one it is alone."""

import mlx.core as mx
import pytest

from mlx_clex.model.scaled_model import make_prompt_cache
from mlx_clex.serving.schedule import DueBatchGenerator

from ..conftest import scaled_llama

STEP = 16


class Served:
    """Requests of a tiny model: when each was answered, and with what."""

    model = None

    def __init__(self, **options):
        self.model = Served.model = Served.model or scaled_llama("clex")
        self.generator = DueBatchGenerator(
            self.model, prefill_step_size=STEP, **{"prefill_batch_size": 8, **options}
        )
        self.answers, self.first, self.progress = {}, [], {}

    def ask(self, length, tokens=4):
        prompt = mx.random.randint(0, 64, (length,), key=mx.random.key(length)).tolist()
        cache = make_prompt_cache(self.model, length)
        (uid,) = self.generator.insert([prompt], max_tokens=[tokens], caches=[cache])
        return uid

    def step(self, count=1):
        for _ in range(count):
            read, made = self.generator.next()
            for response in read:
                self.progress.setdefault(response.uid, []).append(response.progress)
            for response in made:
                if response.uid not in self.answers:
                    self.first.append(response.uid)
                self.answers.setdefault(response.uid, []).append(response.token)

    def finish(self):
        while self.generator._find_uids(range(100)):
            self.step()


def alone(length, tokens=4):
    served = Served()
    uid = served.ask(length, tokens)
    served.finish()
    return served.answers[uid]


def test_answers_come_in_the_order_of_lengths():
    """The shortest of eight clients waited 500 s for the longest."""
    served = Served()
    lengths = [120, 5, 90, 40, 6]
    uids = dict(zip((served.ask(length) for length in lengths), lengths, strict=True))
    served.finish()
    assert [uids[uid] for uid in served.first] == sorted(lengths)
    for uid, length in uids.items():
        assert served.answers[uid] == alone(length), f"{length} tokens"


def test_a_long_prompt_gives_way_and_goes_on_where_it_was():
    """A short request that comes later must not wait for the rest of a long one."""
    served = Served()
    long = served.ask(200)
    served.step(5)
    short = served.ask(20)
    served.finish()
    assert served.first == [short, long]
    assert served.answers[long] == alone(200)
    assert served.answers[short] == alone(20)
    read = [done for done, _ in served.progress[long]]
    assert read == sorted(read)
    assert {total for _, total in served.progress[long]} == {200}


def test_a_long_prompt_does_not_wait_for_ever():
    """A stream of short requests must not starve it."""
    served = Served()
    long = served.ask(60)
    came = {}
    while long not in served.first:
        came[served.ask(20, tokens=1)] = served.generator._counters.prompt_tokens
        assert len(came) < 30
        served.step(2)
    earlier = served.first[: served.first.index(long)]
    assert earlier
    assert all(came[uid] < 60 for uid in earlier)


def test_running_answers_go_on_between_slices_of_a_long_prompt():
    """On a CPU a slice takes seconds, and an answer of 20 tokens waited for 20 of them."""
    served = Served()
    short = served.ask(5, tokens=12)
    served.step(2)
    long = served.ask(200)
    served.step(12)
    assert len(served.answers[short]) == 12
    assert max(done for done, _ in served.progress.get(long, [(0, 0)])) <= STEP


@pytest.mark.parametrize("waits", [True, False])
def test_a_request_can_be_taken_back(waits):
    """Its client has hung up, while it waits or after it gave way."""
    served = Served()
    long = served.ask(200)
    served.step(3)
    short = served.ask(20)
    if not waits:
        served.step(1)
    served.generator.remove([long])
    served.finish()
    assert served.first == [short]
    assert served.answers[short] == alone(20)


def test_alike_prompts_are_read_together():
    """A GPU reads eight short prompts in the time of one."""
    served = Served(prefill_batch_size=3)
    for length in (5, 5, 5, 5, 16):
        served.ask(length)
    served.step()
    # 5 x 3 tokens are within a step of 16.
    assert len(served.generator._prompt_batch) == 3
