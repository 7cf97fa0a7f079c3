"""Hostile requests beside good ones: every good answer is the one that is given alone."""

import concurrent.futures
import json
import socket
import threading

import pytest
from mlx_clex.convert import convert

from ..conftest import GOLDEN
from ..served import GOOD, HEAD, SENTENCE, Server, answers_of, chat, complete
from .test_requests import CHATS, COMPLETIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """clex_llama in float32, so that equal computations pick equal tokens."""
    return convert(GOLDEN / "clex_llama", tmp_path_factory.mktemp("f32") / "m", dtype="float32")


# What only the loaded model can tell.
OF_THE_MODEL = {
    "a bias for no token": GOOD | {"logit_bias": {"512": 1}},
    "more than all tokens": GOOD | {"top_k": 512, "temperature": 1},
    "an id that does not exist": GOOD | {"prompt": [1, 512]},
    "a prompt beyond the reach": GOOD | {"prompt": [1] * 256},
    "a role that the template refuses": {"messages": [{"role": "wizard", "content": "hi"}]},
    "messages that break the template": {"messages": [{"role": "breaking", "content": "hi"}]},
}
# Odd, but to be answered: how many answers.
ANSWERED = [
    (GOOD | {"prompt": ""}, 1),
    (GOOD | {"prompt": ["a", "b"], "n": 2}, 4),
    (GOOD | {"prompt": [[1], [2, 3]]}, 2),
    (GOOD | {"temperature": 100, "max_tokens": 50, "stop": ["e", "\ud83d\ude00"]}, 1),
    (GOOD | {"logit_bias": {"5": -1e6}, "top_logprobs": 20, "stop": "\n"}, 1),
    (GOOD | {"max_tokens": 2**31, "repetition_penalty": 1e6, "presence_penalty": -1e6}, 1),
    (GOOD | {"xtc_probability": 1, "xtc_threshold": 0, "min_p": 1, "temperature": 1}, 1),
    (chat([{"type": "text", "text": "\u0000"}], tools=[{"function": {"name": "f"}}]), 1),
    (chat("hi", chat_template_kwargs={"enable_thinking": {"a": []}}), 1),
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('no magic') }}"
    "{% elif m.role == 'breaking' %}{{ m.content + 5 }}{% endif %}{{ m.content }}{% endfor %}"
)


def test_hostile_requests_beside_good_streams(model):
    """Each of them ended the answers under way; now every good answer is the one given alone."""
    server = Server(model, "--prefill-step-size", "32", "--chat-template", TEMPLATE)
    prompts = [f"{i} " + SENTENCE * (1 + i % 4) for i in range(6)]
    alone = answers_of(model)
    expected = [alone(prompt, 40) for prompt in prompts]
    over = threading.Event()
    wrong = {
        kind: body if isinstance(body, bytes) or "prompt" in body else {"prompt": "a", **body}
        for kind, (body, _) in COMPLETIONS.items()
        if kind != "no prompt"
    }
    wrong |= {kind: body for kind, (body, _) in CHATS.items()} | OF_THE_MODEL

    def good(i):
        answers = 0
        while not over.is_set() or not answers:
            stream = complete(server, prompt=prompts[i], max_tokens=40, stream=True)
            events = [event.choices[0] for event in stream]
            assert "".join(event.text for event in events) == expected[i]
            assert events[-1].finish_reason == "length"
            answers += 1
        return answers

    def send(body):
        is_chat = isinstance(body, dict) and "prompt" not in body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return server.raw("POST", f"/v1/{'chat/' if is_chat else ''}completions", data)

    def hang_up():
        body = json.dumps(GOOD | {"max_tokens": 200, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(HEAD % len(body) + body)
            connection.recv(200)

    half = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    try:
        for connection in half:
            connection.sendall(HEAD % 100 + b"{")
        with concurrent.futures.ThreadPoolExecutor(6) as clients:
            good_clients = [clients.submit(good, i) for i in range(len(prompts))]
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                refusals = dict(zip(wrong, pool.map(send, wrong.values()), strict=True))
                answers = list(pool.map(send, [body for body, _ in ANSWERED]))
                for each in [pool.submit(hang_up) for _ in range(5)]:
                    each.result()
            over.set()
            assert all(client.result() for client in good_clients)
        for kind, (status, text) in refusals.items():
            assert status == 400, (kind, text)
            assert json.loads(text)["error"]["message"], kind
        for (body, count), (status, text) in zip(ANSWERED, answers, strict=True):
            assert status == 200, (body, text)
            assert len(json.loads(text)["choices"]) == count
    finally:
        for connection in half:
            connection.close()
        server.stop()
