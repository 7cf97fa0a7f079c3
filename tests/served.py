"""A server process, its clients, and what the model answers without a server."""

import http.client
import socket
import subprocess
import sys

import openai
from mlx_lm.generate import stream_generate

from mlx_clex import load
from mlx_clex.model.scaled_model import make_prompt_cache

SENTENCE = "The quick brown fox jumps over the lazy dog. "
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
GOOD = {"model": "default_model", "prompt": "hi", "max_tokens": 2}


def chat(content="hi", **fields):
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}


class Server:
    """A server process on a free port."""

    def __init__(self, folder, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "mlx_clex.server", "--model", str(folder)]
        command += ["--port", str(self.port), "--log-level", "WARNING", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        first = self.process.stdout.readline()
        if not first:
            raise AssertionError(self.process.stderr.read())
        url = f"http://127.0.0.1:{self.port}/v1"
        assert first == f"Serving {folder} at {url}\n"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(self, prompt, max_tokens=20, model="default_model", adapters=None, **options):
        """The text that completes a prompt, and the usage."""
        done = self.client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"adapters": str(adapters)} if adapters else {},
            **options,
        )
        return done.choices[0].text, done.usage

    def raw(self, method, path, body=None, headers=None):
        """(status, body) of a request that no client library would send."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json"} | (headers or {})
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        result = answer.status, answer.read()
        connection.close()
        return result

    def stop(self):
        self.process.terminate()
        self.process.communicate(timeout=30)


def complete(server, **options):
    """A completion by the openai client; greedy, and of 20 tokens, unless told otherwise."""
    options = {"model": "default_model", "temperature": 0, "max_tokens": 20, **options}
    return server.client.completions.create(**options)


def text_after(tokenizer, ids, parts):
    """The text of an answer that continues a prompt, with the space that it may begin with."""
    detokenizer = tokenizer.detokenizer
    for token in ids if len(ids) > 1 else ():  # not BOS alone
        detokenizer.add_token(token)
    begin = len(detokenizer.text)
    for part in parts:
        if part.finish_reason != "stop":
            detokenizer.add_token(part.token)
    detokenizer.finalize()
    return detokenizer.text[begin:]


def answers_of(model, adapters=None):
    """A function from a prompt to what a model answers when nothing was served before."""
    loaded, tokenizer = load(model, adapter_path=adapters)

    def answer(prompt, max_tokens=20):
        ids = tokenizer.encode(prompt)
        cache = make_prompt_cache(loaded, len(ids))
        parts = stream_generate(loaded, tokenizer, ids, max_tokens=max_tokens, prompt_cache=cache)
        return text_after(tokenizer, ids, parts)

    return answer
