"""A saved conversation may come from a stranger, or from a full disk."""

import json
import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_clex.convert import convert

from mlx_clex import load
from mlx_clex.checkpoint.fingerprint import fingerprint
from mlx_clex.errors import InputError
from mlx_clex.serving.conversation import Conversation

from ..conftest import GOLDEN

SENTENCE = "The quick brown fox jumps over the lazy dog. "
STATE, CACHES = "0.conversation", "0.mlx_clex"  # entries of the metadata


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A conversation of two turns, and the bytes of its file."""
    folder = tmp_path_factory.mktemp("f32") / "m"
    convert(GOLDEN / "clex_llama", folder, dtype="float32")
    model, tokenizer = load(folder)
    conversation = Conversation(model, tokenizer, identity=fingerprint(model, folder), max_tokens=8)
    conversation.read(SENTENCE)
    for message in ("A cat.", "A dog."):
        list(conversation.answer(message))
    file = conversation.save(tmp_path_factory.mktemp("saved") / "talk")
    return conversation, file.read_bytes()


@pytest.fixture
def refused(talk, tmp_path):
    """A function that restores bytes: one line, and the conversation goes on as before."""
    saved, _ = talk
    conversation = Conversation(saved.model, saved.tokenizer, identity=saved.identity, max_tokens=4)
    list(conversation.answer("A fox."))

    def check(data):
        file = tmp_path / "broken.safetensors"
        file.write_bytes(data)
        before = (list(conversation.tokens), list(conversation.messages), conversation.context())
        with pytest.raises(InputError) as refusal:
            conversation.restore(file)
        assert str(file) in str(refusal.value)
        after = (conversation.tokens, conversation.messages, conversation.context())
        assert after == before
        return str(refusal.value)

    yield check
    list(conversation.answer("And then?"))
    assert len(conversation.messages) == 4


def parts(data):
    """The header of a safetensors file and the data behind it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def with_entry(data, entry, change):
    """The file with one JSON entry of its metadata changed in place."""
    header, body = parts(data)
    value = json.loads(header["__metadata__"][entry])
    change(value)
    header["__metadata__"][entry] = json.dumps(value)
    return joined(header, body)


def test_the_file_as_saved_is_restored(talk, tmp_path):
    """The fixture below would refuse everything if the rewriting itself broke the file."""
    saved, data = talk
    (tmp_path / "talk.safetensors").write_bytes(with_entry(data, STATE, lambda _: None))
    conversation = Conversation(saved.model, saved.tokenizer, identity=saved.identity)
    conversation.restore(tmp_path / "talk")
    assert conversation.messages == saved.messages
    assert conversation.tokens == saved.tokens
    assert "".join(conversation.retry())


def test_a_truncated_file(talk, refused):
    """40 places, in the header and in the data."""
    _, data = talk
    chooser = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1]
    places += [chooser.randrange(header) for _ in range(15)]
    places += [chooser.randrange(header, len(data)) for _ in range(16)]
    for place in places:
        refused(data[:place])


WRONG: list[Any] = [
    None,
    True,
    -1,
    1 << 40,
    1 << 70,
    0.5,
    "x",
    "\ud800",
    [],
    [None],
    {},
    [[]],
    [-1],
    [1.5],
]
# Those of them that a field may have.
RIGHT = {"system_prompt": (None, "x"), "ended": (True,), "asked": ()}
FIELDS = (*RIGHT, "open", "cached", "format", "messages", "tokens")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_wrong_type(talk, refused, field):
    """Counts below 0 and messages without text were found at the next turn, or never."""
    _, data = talk
    for value in WRONG:
        if not any(value is right for right in RIGHT.get(field, ())):
            refused(with_entry(data, STATE, lambda state, v=value: state.update({field: v})))
    if field != "asked":  # older files lack it
        refused(with_entry(data, STATE, lambda state: state.pop(field)))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(cached=len(s["tokens"]) + 1),
        lambda s: s.update(cached=len(s["tokens"]) - 1),
        lambda s: s.update(cached=0.0),
        lambda s: s.update(asked=len(s["tokens"])),
        lambda s: s["tokens"].append(10**9),
        lambda s: s["tokens"].append(True),
        lambda s: s["messages"].pop(),
        lambda s: s["messages"].append({"role": "assistant", "content": "x"}),
        lambda s: s["messages"][0].update(role="system"),
        lambda s: s["messages"][0].update(content=["x"]),
        lambda s: s["messages"][0].update(content="\udc80"),
        lambda s: s["messages"][0].update(more="x"),
        lambda s: s["messages"][0].pop("content"),
        lambda s: s.update(open=True),
    ],
)
def test_a_conversation_that_contradicts_itself(talk, refused, change):
    """Each is refused before the conversation takes anything of the file."""
    _, data = talk
    assert "damaged conversation" in refused(with_entry(data, STATE, change))


def test_more_tokens_than_the_model_reaches(talk, refused):
    """Every message after it would have been refused."""
    _, data = talk
    longer = with_entry(data, STATE, lambda state: state.update(tokens=state["tokens"] * 9))
    assert "this model reaches 256" in refused(longer)


@pytest.mark.parametrize("scale", [None, 0, -1, float("nan"), float("inf"), "x", [], {}])
def test_a_scale_that_keys_cannot_have(talk, refused, scale):
    """The scales are numbers of at least 1, one for each layer."""
    _, data = talk

    def change(entry):
        entry["scales"][0] = scale

    refused(with_entry(data, CACHES, change))
    refused(with_entry(data, CACHES, lambda entry: entry["scales"].pop()))
    refused(with_entry(data, CACHES, lambda entry: entry.update(fingerprint=[scale])))


def test_metadata_of_a_wrong_type(talk, refused):
    """Whatever mlx-lm raises for them is one line."""
    _, data = talk
    header, body = parts(data)
    metadata = header["__metadata__"]
    wrong = ("", "[", "[" * 100_000, "{}", "null", "BatchKVCache", "save_prompt_cache")
    for key in metadata.keys() - {"2.0"}:  # mlx-lm's filler, which nothing reads
        for value in wrong:
            changed = {**metadata, key: value}
            refused(joined({**header, "__metadata__": changed}, body))
        less = {name: text for name, text in metadata.items() if name != key}
        refused(joined({**header, "__metadata__": less}, body))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.0", lambda keys: keys[:, :1]),
        ("0.0", lambda keys: keys[..., :1]),
        ("0.0", lambda keys: keys[:, :, :8]),
        ("0.0", lambda keys: keys[0]),
        ("0.0", lambda keys: mx.concatenate([keys, keys])),
        ("0.0", lambda keys: keys * float("nan")),
        ("0.0", lambda keys: keys.astype(mx.int32)),
        ("1.1", lambda values: values[:, :, :0]),
        ("0.2", lambda offset: offset - 1),
        ("0.2", lambda offset: -offset),
        ("0.2", lambda offset: offset.astype(mx.float32)),
        ("0.2", lambda offset: offset + 1000),
        ("1.2", lambda offset: mx.array([1, 2])),
        ("0.4", lambda length: length - 10**6),
        ("0.4", lambda length: length.astype(mx.float32)),
    ],
)
def test_a_cache_of_another_size(talk, refused, tmp_path, name, change):
    """Layers of other sizes failed at the next turn; those of other lengths answered wrongly."""
    _, data = talk
    file = tmp_path / "changed.safetensors"
    file.write_bytes(data)
    arrays, metadata = mx.load(str(file), return_metadata=True)
    arrays[name] = change(arrays[name])
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, metadata)
    refused(file.read_bytes())
