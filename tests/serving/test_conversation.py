"""A conversation keeps one cache, and reads each token once."""

import json

import mlx.core as mx
import pytest
from mlx_clex.convert import convert

from mlx_clex import load, make_prompt_cache
from mlx_clex.checkpoint.fingerprint import fingerprint
from mlx_clex.data.text import read_text
from mlx_clex.errors import InputError
from mlx_clex.serving.conversation import Conversation, Stopped

from ..conftest import GOLDEN

SENTENCE = "The quick brown fox jumps over the lazy dog. "
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """clex_llama in float32, trained length 32, reach 256, without a chat template."""
    return convert(GOLDEN / "clex_llama", tmp_path_factory.mktemp("f32") / "m", dtype="float32")


@pytest.fixture(scope="session")
def templated(tmp_path_factory):
    """gene_llama in float32, which has no end, with a chat template."""
    folder = tmp_path_factory.mktemp("f32") / "m"
    convert(GOLDEN / "gene_llama", folder, dtype="float32")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def answer_of(conversation, message):
    return "".join(conversation.answer(message))


def saying(tokenizer, text):
    """A sampler that says `text` and ends."""
    script = iter(tokenizer.encode(text, add_special_tokens=False))
    return lambda logprobs: mx.array([next(script, tokenizer.eos_token_id)])


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "cut"])
def test_turns_add_up_to_the_template(templated, ends):
    """The end of an answer was there twice, or missing where the answer had been cut."""
    model, tokenizer = load(templated)
    conversation = Conversation(model, tokenizer, system_prompt="Be brief.")
    for question, answer in [("How are you?", "fine, thanks"), ("Really?", "yes")]:
        conversation.sampler = saying(tokenizer, answer)
        length = len(tokenizer.encode(answer, add_special_tokens=False))
        conversation.max_tokens = 100 if ends else length
        assert answer_of(conversation, question).strip() == answer
        assert conversation.finish == ("stop" if ends else "length")

    system = [{"role": "system", "content": "Be brief."}]
    whole = tokenizer.apply_chat_template(system + conversation.messages, tokenize=False)
    whole = whole.removesuffix("\n" if ends else "</s>\n")
    assert squeezed(tokenizer.decode(conversation.tokens)) == squeezed(whole)


def test_a_document_begins_the_next_message(templated):
    """The document was a message of its own, and the model answered it."""
    model, tokenizer = load(templated)
    conversation = Conversation(model, tokenizer, sampler=saying(tokenizer, "fox"))
    conversation.read("First.")
    conversation.read("Second.")
    assert len(conversation.messages) == 1
    answer_of(conversation, "Who jumps?")

    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant"]
    text = squeezed(tokenizer.decode(conversation.tokens))
    wanted = "<s>user First. Second. Who jumps?</s> <s>assistant fox</s>"
    assert text == squeezed(wanted)


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "cut"])
def test_a_message_behind_a_document_has_the_tokens_of_both_at_once(templated, ends):
    """The tokenizer began each piece with a space that nobody wrote."""
    model, tokenizer = load(templated)
    conversation = Conversation(model, tokenizer, sampler=saying(tokenizer, "fox"))
    conversation.max_tokens = 100 if ends else 1
    conversation.read("First.\n  Line")
    conversation.read("Second.")
    answer_of(conversation, "Who jumps?")
    first = "<s>user\nFirst.\n  Line\n\nSecond.\n\nWho jumps?</s>\n<s>assistant\n"
    wanted = tokenizer.encode(first, add_special_tokens=False)
    assert conversation.tokens[: len(wanted)] == wanted
    answered = len(conversation.tokens)
    answer_of(conversation, "Why?")
    both = first + "</s>\n<s>user\nWhy?</s>\n<s>assistant\n"
    wanted = tokenizer.encode(both, add_special_tokens=False)[len(wanted) + ends :]
    assert conversation.tokens[answered : answered + len(wanted)] == wanted


def squeezed(text):
    """Without white space, which sentencepiece adds at the beginning of each piece."""
    return "".join(text.split())


def test_a_turn_reads_only_what_is_new(plain):
    """Each turn read the whole conversation again."""
    model, tokenizer = load(plain)
    conversation = Conversation(model, tokenizer, max_tokens=10)
    answer_of(conversation, SENTENCE * 2)
    before = len(conversation.tokens)
    calls = []
    list(conversation.answer(SENTENCE, lambda *call: calls.append(call)))

    new = len(conversation.tokens) - before - conversation.generated - 1
    assert calls == [(0, new), (new, new)]  # the last one is fed by the generation


def test_answers_are_those_of_one_pass_at_a_fixed_scale(plain):
    """Feeding turn by turn put tokens at other positions."""
    model, tokenizer = load(plain, scale=8)
    conversation = Conversation(model, tokenizer, policy=8.0, max_tokens=12, prefill_step_size=7)
    for message in (SENTENCE * 2, "And a cat.", SENTENCE):
        answer_of(conversation, message)

    tokens, count = conversation.tokens, conversation.generated
    logits = model(mx.array([tokens]), cache=make_prompt_cache(model))
    greedy = logits[0].argmax(-1).tolist()
    assert greedy[-count - 1 : -1] == tokens[-count:]


def test_the_scale_follows_the_conversation(plain):
    """Each turn is planned for its length, and the first pass of it has that scale."""
    model, tokenizer = load(plain)
    planned = Conversation(model, tokenizer, max_tokens=4, prefill_step_size=8)
    grown = Conversation(model, tokenizer, policy="grow", max_tokens=4, prefill_step_size=8)
    assert planned.context().scale == 1
    seen = {}
    for name, conversation in (("prompt", planned), ("grow", grown)):
        scales = seen[name] = []
        conversation.read(
            SENTENCE,
            lambda done, _, c=conversation, s=scales: s.append(c._cache[0].scale) if done else None,
        )
        answer_of(conversation, SENTENCE)
        assert conversation.context().scale == model.scale_at(len(conversation.tokens))

    assert set(seen["prompt"]) == {model.scale_at(len(tokenizer.encode(SENTENCE)))}
    assert seen["grow"][0] == 1


@pytest.mark.parametrize("trimmable", [True, False])
def test_stopped_reading_leaves_the_conversation_as_it_was(plain, monkeypatch, trimmable):
    """Half a document stayed in the cache, under tokens that the conversation did not have."""
    model, tokenizer = load(plain, scale=8)

    def two_turns(*, stop):
        conversation = Conversation(model, tokenizer, policy=8.0, max_tokens=8, prefill_step_size=8)
        answer_of(conversation, "A cat.")
        if stop:
            tokens = list(conversation.tokens)
            with pytest.raises(Stopped):
                conversation.read(SENTENCE, lambda *_: conversation.stop.set())
            assert conversation.tokens == tokens
            assert len(conversation.messages) == 2
        return answer_of(conversation, "A dog.")

    wanted = two_turns(stop=False)
    if not trimmable:
        monkeypatch.setattr("mlx_clex.serving.conversation.can_trim_prompt_cache", lambda _: False)
    assert two_turns(stop=True) == wanted


def test_a_stopped_answer_stays(plain):
    """What was said before the stop is part of the conversation."""
    model, tokenizer = load(plain)
    conversation = Conversation(model, tokenizer, max_tokens=100)
    pieces = []
    for piece in conversation.answer("A cat."):
        pieces.append(piece)
        if len(pieces) == 5:
            conversation.stop.set()

    assert conversation.finish == "stopped"
    assert conversation.messages[-1]["content"] == "".join(pieces)
    assert conversation._cache[0].offset == len(conversation.tokens)
    answer_of(conversation, "A dog.")
    assert conversation._cache[0].offset == len(conversation.tokens)


def test_a_hard_reach_is_refused_and_the_conversation_goes_on(plain):
    """A message too long ended the program, or left half of itself behind."""
    model, tokenizer = load(plain)
    conversation = Conversation(model, tokenizer, max_tokens=300)
    answer_of(conversation, "A cat.")
    assert conversation.finish == "reach"
    assert len(conversation.tokens) == 256
    before = conversation.context()
    for attempt in (conversation.read, lambda text: list(conversation.answer(text))):
        with pytest.raises(InputError, match=r"this model reaches 256 \(trained length 32 x"):
            attempt(SENTENCE)
    assert conversation.context() == before

    conversation.reset()
    conversation.max_tokens = 4
    answer_of(conversation, SENTENCE)
    assert conversation.context().tokens > 4


def test_reading_tells_its_progress_from_the_start(templated):
    """A document of one chunk showed nothing, and then 100 % at millions of tokens a second."""
    conversation = Conversation(*load(templated))
    calls = []
    count = conversation.read(SENTENCE * 100, lambda *call: calls.append(call))

    done = [call[0] for call in calls]
    assert done[0] == 0
    assert done[-1] == count
    assert len(done) > 4
    assert {call[1] for call in calls} == {count}


def test_retry_replaces_the_last_answer(plain):
    """Nothing is read again, and the conversation has one answer to the message."""
    model, tokenizer = load(plain, scale=8)
    conversation = Conversation(model, tokenizer, policy=8.0, max_tokens=8)
    with pytest.raises(InputError, match="no answer to replace"):
        list(conversation.retry())
    conversation.read(SENTENCE)
    wanted = answer_of(conversation, "A cat.")
    tokens, messages = list(conversation.tokens), list(conversation.messages)
    calls = []
    assert "".join(conversation.retry(lambda *call: calls.append(call))) == wanted
    assert (conversation.tokens, conversation.messages, calls) == (tokens, messages, [])

    conversation.sampler = lambda logprobs: mx.array([7])
    other = "".join(conversation.retry())
    assert conversation.messages[-1]["content"] == other != wanted
    assert len(conversation.messages) == 2
    assert conversation._cache[0].offset == len(conversation.tokens)
    conversation.sampler = None
    assert "".join(conversation.retry()) == wanted

    conversation.read(SENTENCE)
    with pytest.raises(InputError, match="no answer to replace"):
        list(conversation.retry())


def test_a_new_system_prompt_starts_anew(templated, plain):
    """It stands once, before the first message."""
    conversation = Conversation(*load(templated), max_tokens=4)
    answer_of(conversation, "A cat.")
    conversation.begin("Be brief.")
    assert conversation.context().tokens == 0
    answer_of(conversation, "A dog.")
    text = squeezed(conversation.tokenizer.decode(conversation.tokens))
    assert text.startswith(squeezed("<s>system Be brief.</s> <s>user A dog.</s>"))

    untemplated = Conversation(*load(plain), max_tokens=4)
    answer_of(untemplated, "A cat.")
    before = untemplated.context()
    with pytest.raises(InputError, match="needs a chat template"):
        untemplated.begin("Be brief.")
    assert untemplated.context() == before


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no') }}", "does not take the messages: no"),
        ("{{ messages + 1 }}", "does not take the messages: can only concatenate"),
        ("{{ 1 // 0 }}", "does not take the messages: .*by zero"),
        ("{% if %}", "does not take the messages: "),
        ("{{ 2 ** 'x' }}", "does not take the messages: "),
        ("hello", "does not show each message once"),
        ("{{ messages[-1].content }}", "does not show each message once"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "does not show each message"),
    ],
)
def test_templates_that_cannot_be_used(templated, template, reason):
    """A template that raised anything but jinja's errors ended the chat."""
    model, tokenizer = load(templated)
    conversation = Conversation(model, tokenizer, max_tokens=4)
    answer_of(conversation, "A cat.")
    good, before = tokenizer._tokenizer.chat_template, conversation.context()
    tokenizer._tokenizer.chat_template = template
    with pytest.raises(InputError, match=reason):
        answer_of(conversation, "A dog.")
    tokenizer._tokenizer.chat_template = good
    assert conversation.context() == before
    answer_of(conversation, "A dog.")


def test_one_bos_token(plain, templated):
    """A text that begins with the BOS text got two, and the answer was another."""
    for folder in (plain, templated):
        model, tokenizer = load(folder)
        asked = []
        for text in ("A cat.", tokenizer.bos_token + "A cat."):
            conversation = Conversation(model, tokenizer, max_tokens=4)
            answer_of(conversation, text)
            asked.append(conversation.tokens[: conversation._asked])
            answer_of(conversation, text)
        # This template has one BOS text before each message.
        bos = [tokens.count(tokenizer.bos_token_id) for tokens in asked]
        assert bos == ([2, 2] if folder == templated else [1, 1])
        assert asked[0] == asked[1]


def known(folder, **options):
    """A conversation that knows whose it is."""
    model, tokenizer = load(folder, **options)
    return Conversation(model, tokenizer, identity=fingerprint(model, folder), max_tokens=8)


def test_saved_and_restored_it_goes_on_without_reading(plain, templated, tmp_path):
    """The same answer as without the detour, from the tokens of the new message alone."""
    conversation = known(plain)
    conversation.read(SENTENCE * 2)
    answer_of(conversation, "A cat.")
    file = conversation.save(tmp_path / "talk")
    assert file == tmp_path / "talk.safetensors"
    assert list(tmp_path.iterdir()) == [file]
    wanted = answer_of(conversation, "A dog.")

    other = known(plain)
    other.restore(tmp_path / "talk")
    counts = []
    answer = "".join(other.answer("A dog.", lambda done, total: counts.append(total)))

    assert answer == wanted
    assert other.messages == conversation.messages
    assert counts[0] < 20
    with pytest.raises(InputError, match="made with another version of m"):
        known(templated).restore(file)
    with pytest.raises(InputError, match=r"fixed scale: none in the file, 2\.0 in this model"):
        known(plain, scale=2.0).restore(file)


def test_files_that_cannot_be_used(plain, tmp_path):
    """Each is refused with its name and the reason."""
    conversation = Conversation(*load(plain))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.safetensors").write_bytes(b"no cache")
    for attempt, reason in [
        (lambda: conversation.save(tmp_path / "x"), "nothing to save"),
        (lambda: conversation.restore(tmp_path / "none"), "There is no file"),
        (lambda: conversation.restore(tmp_path / "bad.safetensors"), "no saved cache"),
        (lambda: read_text(tmp_path / "bytes"), "no UTF-8 text"),
        (lambda: read_text(tmp_path / "none"), "No such file"),
        (lambda: conversation.read(" \n"), "is empty"),
        (lambda: Conversation(*load(plain), system_prompt="x"), "chat template"),
    ]:
        with pytest.raises(InputError, match=reason):
            attempt()
