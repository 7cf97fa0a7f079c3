"""The thread that generates survives what its requests do, and divides an answer's text."""

import argparse
import json
import math
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from mlx_lm.server import GenerationContext, Response, ResponseGenerator
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_clex import bundled
from mlx_clex.errors import RunError
from mlx_clex.server import add_arguments
from mlx_clex.serving.answer_text import AnswerText
from mlx_clex.serving.answers import Choice
from mlx_clex.serving.fields import RequestError
from mlx_clex.serving.generation import (
    PlanningResponseGenerator,
    ScaledModelProvider,
    _Bounded,
    _fill_detokenizer,
)
from mlx_clex.serving.jobs import Jobs
from mlx_clex.serving.prompt_caches import PlannedPromptCache
from mlx_clex.serving.requests import Served, read_request


def test_a_request_that_breaks_generation_fails_alone():
    """An error while tokens are made killed the thread that answers everybody."""

    class Generator(PlanningResponseGenerator):
        runs = 0

        def _generate(self):
            self.runs += 1
            while not self._stop:
                if self._next_request(timeout=0.05) is not None and self.runs == 1:
                    raise RuntimeError("the first request: GPU Timeout Error")

    provider = SimpleNamespace(model=object())
    generator = Generator(provider, PlannedPromptCache(provider, 1))
    try:
        with pytest.raises(RunError, match=r"the first request.*--prefill-step-size 512"):
            list(Jobs(generator, [(object(), None)]))
        assert generator.generation_available()
        assert generator.runs == 2
    finally:
        generator.stop_and_join()


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_a_request_served_alone_can_be_ended(ended, reading, monkeypatch):
    """Ctrl-C waited for its last token, and a client that hung up for its whole prompt."""
    running = threading.Event()

    def serve_single(self, request, stream):
        ticket = request[0]
        context = GenerationContext(False, False, None, None, "normal", [1])
        try:
            ticket.put(context)
            while not context._should_stop or reading:
                ticket.put((1, 2) if reading else Response("a", 1, -1.0, None, ()))
                running.set()
                assert time.monotonic() < end, "it is not stopped"
            ticket.put(None)
        except RunError as error:
            ticket.put(error)

    class Generator(PlanningResponseGenerator):
        def _generate(self):
            while not self._stop:
                if (request := self._next_request(timeout=0.05)) is not None:
                    self._serve_single(request, None)

    monkeypatch.setattr(ResponseGenerator, "_serve_single", serve_single)
    provider = SimpleNamespace(model=object())
    generator = Generator(provider, PlannedPromptCache(provider, 1))
    end = time.monotonic() + 5
    jobs = Jobs(generator, [(object(), None)])
    running.wait(5)
    if ended:
        generator.stop_and_join()
        with pytest.raises(RunError, match="The server ended"):
            list(jobs)
    else:
        monkeypatch.setattr(generator, "can_stop", lambda args: True)
        jobs.stop()
        with pytest.raises(RunError, match="was stopped") if reading else nullcontext():
            list(jobs)
        generator.stop_and_join()
    assert time.monotonic() < end


@pytest.fixture
def loaded():
    """Return a function from models to the generator that loads them, and its served names."""
    made = []

    def start(*options):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args(options)
        provider = ScaledModelProvider(args)
        made.append(PlanningResponseGenerator(provider, PlannedPromptCache(provider, 10)))
        return made[-1], Served(args.model, None, args.draft_model, args.allow_model, [])

    yield start
    for generator in made:
        generator.stop_and_join()


def ask(generator, served, **fields):
    """Return what the jobs of a completion request yield."""
    body = json.dumps({"prompt": "the king", "max_tokens": 2, **fields}).encode()
    request = read_request(body, chat=False, served=served, defaults=generator.cli_args)
    return list(Jobs(generator, request.jobs))


def test_a_draft_model_of_a_shorter_reach_sets_the_limit(loaded):
    """A prompt past it was HTTP 404: model not found."""
    generator, served = loaded("--model", "bundled:gene", "--draft-model", "bundled:clex")
    with pytest.raises(RequestError, match=r"draft model bundled:clex's maximum .* 2048") as error:
        ask(generator, served, prompt=[5] * 2048)
    assert (error.value.status, error.value.code) == (400, "context_length_exceeded")
    assert generator.model_provider.first_limit == 2048


def test_a_soft_reach_is_no_limit(loaded):
    """/v1/models told 2,048 tokens of a model that answered prompts of 3,786."""
    generator, served = loaded("--model", "bundled:gene")
    ask(generator, served)
    assert generator.model_provider.first_limit is None


def test_a_model_that_does_not_load_is_not_found(loaded):
    """The request gets HTTP 404, and the server goes on."""
    generator, served = loaded("--model", "bundled:base", "--allow-model", "/nowhere")
    with pytest.raises(RequestError, match="/nowhere") as error:
        ask(generator, served, model="/nowhere")
    assert (error.value.status, error.value.code) == (404, "model_not_found")
    assert ask(generator, served)


def test_kept_caches_make_room_for_a_request(loaded):
    """Ten kept prompts filled the memory, while each request alone was found to fit."""
    generator, served = loaded("--model", "bundled:base")
    kept = []

    def check_length(length):
        kept.append(len(generator.prompt_cache))
        return [math.inf, math.inf, generator.prompt_cache.nbytes - 1, 0][len(kept) - 1]

    generator.model_provider.check_length = check_length
    for word in ("the", "a", "he", "she"):
        ask(generator, served, prompt=f"{word} king said")
    assert kept == [0, 1, 2, 2]
    assert len(generator.prompt_cache) < 2


class Letters:
    """A tokenizer whose tokens are the letters of the alphabet it is given; 0 ends a text."""

    eos_token_ids = frozenset([0])
    has_thinking = True
    think_start, think_end = "<", ">"
    has_tool_calling = True
    tool_call_start, tool_call_end = "{", "}"
    structural_markers = ()
    response_transitions: Mapping[str, Any] = MappingProxyType({})

    @property
    def detokenizer(self):
        return Detokenizer()


class Detokenizer:
    """Holds a space back until the next token, as mlx-lm's do."""

    text = held = ""

    def add_token(self, token):
        text = self.held + chr(token)
        self.held = " " if text.endswith(" ") else ""
        self.text += text.removesuffix(" ")

    def finalize(self):
        self.text += self.held
        self.held = ""

    @property
    def last_segment(self):
        text, self.text = self.text, ""
        return text


def read(text, stop=(), state="normal"):
    """(parts joined by state, letters read) of an answer that would be `text`."""
    answer = AnswerText(Letters(), stop, state)
    matcher = answer.matcher()
    count = 1 + next(i for i, letter in enumerate(text + "\0") if matcher.advance(ord(letter)))
    parts = [part for _ in range(count) for part in answer.take()] + answer.finish()
    joined = []
    for kind, piece in parts:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + piece)
        elif piece:
            joined.append((kind, piece))
    return joined, count


@pytest.mark.parametrize(
    ("text", "stop", "expected", "count"),
    [
        ("ab cd ", [], [("normal", "ab cd ")], 7),
        ("ab cd", ["b c"], [("normal", "a")], 4),
        ("ab", ["bc"], [("normal", "ab")], 3),
        ("<cat>a cat", ["cat"], [("reasoning", "cat"), ("normal", "a ")], 10),
        ("a{cat}b", ["cat"], [("normal", "a"), ("tool", "cat"), ("normal", "b")], 8),
        ("ca{x}t", ["cat"], [("normal", "ca"), ("tool", "x"), ("normal", "t")], 7),
        ("a{x", [], [("normal", "a"), ("tool", "x")], 4),
    ],
)
def test_stop_strings_end_the_text_that_is_shown(text, stop, expected, count):
    """Reasoning and tool calls may have them; a stop string held back is not lost."""
    assert read(text, stop) == (expected, count)


@pytest.mark.parametrize("stop", [[], ["cat"]])
def test_adjacent_tool_calls_are_two_calls(stop):
    """Without a text between them they became one call, which no parser could read."""
    context = SimpleNamespace(
        tool_parser=lambda text, tools: {"name": text, "arguments": {}},
        text_sm=AnswerText(Letters(), stop, "normal"),
    )
    request: Any = SimpleNamespace(chat=True, stream=False, tools=[], logprobs=False)
    choice = Choice(0, context, request)
    for letter in "a c{one}{two}\0":
        ended = context.text_sm.advance(ord(letter))
        choice.add(Response("", ord(letter), -1.0, "stop" if ended else None, ()))
    message = choice.take(request)["message"]
    assert message["content"] == "a c"
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["one", "two"]


def test_an_answer_may_begin_with_reasoning():
    """The template has opened it then."""
    assert read("cat>cat", ["cat"], "reasoning") == ([("reasoning", "cat")], 7)


def test_tokens_without_a_text_end_no_answer():
    """A padded vocabulary has more tokens than the tokenizer, and high temperatures pick them."""
    folder = bundled.FOLDER / "base"
    inner = AutoTokenizer.from_pretrained(folder)
    tokenizer = TokenizerWrapper(inner, SPMStreamingDetokenizer)
    size = len(inner)
    with pytest.raises(IndexError):
        tokenizer.detokenizer.add_token(size + 5)
    _fill_detokenizer(tokenizer, size + 10)
    ids = inner.encode("the king", add_special_tokens=False)
    texts = [
        joined(AnswerText(tokenizer, [], "normal"), tokens)
        for tokens in (ids, [ids[0], size + 5, *ids[1:]])
    ]
    assert texts[0] == texts[1] != ""


def byte_level():
    """A BPE tokenizer of bytes, as in GPT-2."""
    letters = sorted(ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def sentence_piece():
    """A tokenizer of letters and bytes that puts a space before each text, as in LLaMA."""
    words = [*(f"<0x{i:02X}>" for i in range(256)), *"\u2581\nInsixdayhetkg"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    ("make", "detokenizer"),
    [
        (sentence_piece, SPMStreamingDetokenizer),
        (sentence_piece, NaiveStreamingDetokenizer),
        (byte_level, BPEStreamingDetokenizer),
        (byte_level, NaiveStreamingDetokenizer),
    ],
)
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("In six", " days  he"),
        ("In six ", "days"),
        ("In six\n", " days"),
        ("the king", "s \u00e4 \U0001f600"),
    ],
)
def test_a_completion_keeps_the_space_that_it_begins_with(prompt, expected, make, detokenizer):
    """mlx-lm's detokenizers trim it, so "In six" and its answer together said "In sixdays"."""
    tokenizer = TokenizerWrapper(make(), detokenizer)
    ids = tokenizer.encode(prompt)
    after = tokenizer.encode(prompt + expected)[len(ids) :]
    assert joined(AnswerText(tokenizer, [], "normal", ids), after) == expected
    if detokenizer is not NaiveStreamingDetokenizer:
        message = joined(AnswerText(tokenizer, [], "normal"), after)
        assert message == expected.removeprefix(" ")


@pytest.mark.parametrize("detokenizer", [BPEStreamingDetokenizer, NaiveStreamingDetokenizer])
def test_a_character_that_the_prompt_began_is_shown_whole(detokenizer):
    """Its last bytes alone are no text."""
    tokenizer = TokenizerWrapper(byte_level(), detokenizer)
    ids = tokenizer.encode("ab\U0001f600c")
    assert joined(AnswerText(tokenizer, [], "normal", ids[:4]), ids[4:]) == "\U0001f600c"


def test_a_completion_keeps_reasoning_and_tool_calls():
    """They were left out of the text, and completions have no other place for them."""
    marks = {"tool_call_start": "<call>", "tool_call_end": "</call>"}
    tokenizer = TokenizerWrapper(byte_level(), BPEStreamingDetokenizer, **marks)
    tokens = tokenizer.encode(" a<call>b</call>c")
    assert joined(AnswerText(tokenizer, [], "normal", tokens), tokens) == " a<call>b</call>c"
    assert joined(AnswerText(tokenizer, [], "normal"), tokens) == "abc"


def joined(answer, tokens):
    """The text of an answer of these tokens."""
    assert not any(answer.advance(token) for token in tokens)
    parts = [part for _ in tokens for part in answer.take()] + answer.finish()
    return "".join(text for _, text in parts)


def test_a_text_is_measured_before_it_is_tokenised():
    """Also what a template makes of short messages."""

    class Tokenizer:
        encoded = 0
        bos_token = None

        def encode(self, text, **_):
            self.encoded += 1
            return [1]

        def apply_chat_template(self, messages, tokenize=True):
            text = "".join(messages) * 100
            return self.encode(text) if tokenize else text

    inner = Tokenizer()
    bounded = _Bounded(inner, reach=10, longest=4)
    assert bounded.encode("a" * 40) == [1]
    for refuse in (
        lambda: bounded.encode("ä" * 21),
        lambda: bounded.apply_chat_template("a", tokenize=True),
    ):
        with pytest.raises(RequestError, match="maximum context length is 10 tokens") as error:
            refuse()
        assert error.value.code == "context_length_exceeded"
    assert inner.encoded == 1
