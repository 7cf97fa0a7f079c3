"""`make soak`: eight OpenAI clients for half an hour, beside clients that hang up and abuse.

Every answer must be the one that the model gives alone, no stream may break off, and the
server's memory must stay flat.

Run it as `python -m tests.hostile.soak [--seconds N]`.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mlx_clex.convert import convert

from ..conftest import GOLDEN
from ..served import GOOD, HEAD, SENTENCE, Server, answers_of
from .requests import memory_of, requests, status_of

_CLIENTS = 8
_PROMPTS = 24  # more than the server keeps caches of
_TOKENS = (1, 8, 40)
_GROWTH = 64 << 20  # bytes that the server may gain after a quarter of the time
_WARM = 300  # seconds from which a run is long enough to judge that
_PATIENCE = 600.0  # seconds for an answer: the machine may be busy
_LARGE = 100_000  # bytes
_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


class Soak:
    """A server, what its clients counted, and what they lost."""

    def __init__(self, model: Path, secret: Path, seconds: float) -> None:
        """Ask the model alone for every answer, then start the server."""
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self.secret = secret
        alone = answers_of(model)
        self.prompts = [f"{i} " + SENTENCE * (1 + i % 4) for i in range(_PROMPTS)]
        self.expected = {(p, n): alone(p, n) for p in self.prompts for n in _TOKENS}
        options = ("--prefill-step-size", "32", "--chat-template", _TEMPLATE)
        self.server = Server(model, *options, "--log-level", "ERROR")
        self.end = time.monotonic() + seconds
        self.seconds = seconds

    def _until_the_end(self, what: str, act: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < self.end and len(self.lost) < 100:
            try:
                act(rng)
                self.counts[what] += 1
            except Exception as error:
                self.lost.append(f"{what}: {type(error).__name__}: {error}"[:500])

    def good(self, rng: random.Random) -> None:
        """Ask for an answer, in one of the ways of the API, and compare it."""
        prompt, tokens = rng.choice(self.prompts), rng.choice(_TOKENS)
        want = self.expected[prompt, tokens]
        options: Any = {"model": "default_model", "temperature": 0, "max_tokens": tokens}
        client = self.server.client
        way = rng.randrange(4)
        if way == 0:
            got = client.completions.create(prompt=prompt, **options).choices[0].text
        elif way == 1:
            events = list(client.completions.create(prompt=prompt, stream=True, **options))
            got = "".join(event.choices[0].text for event in events)
            assert events[-1].choices[0].finish_reason, "a stream without an end"
        elif way == 2:
            choices = client.completions.create(prompt=[prompt, prompt], **options).choices
            assert choices[0].text == choices[1].text, "two answers to one prompt"
            got = choices[0].text
        else:
            got = client.completions.create(prompt=prompt, seed=rng.randrange(99), **options)
            got = got.choices[0].text
        assert got == want, f"{prompt[:20]!r}, {tokens} tokens: {got!r}, alone {want!r}"

    def hang_up(self, rng: random.Random) -> None:
        """Ask for a long answer, and leave."""
        body = json.dumps(GOOD | {"max_tokens": 200, "stream": rng.random() < 0.7}).encode()
        address = ("127.0.0.1", self.server.port)
        with socket.create_connection(address, timeout=_PATIENCE) as connection:
            connection.sendall(HEAD % len(body) + body)
            if rng.random() < 0.5:
                connection.recv(200)
        time.sleep(0.05)

    def half(self, rng: random.Random) -> None:
        """Send half a request, and leave after a while."""
        address = ("127.0.0.1", self.server.port)
        connection = socket.create_connection(address, timeout=_PATIENCE)
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall((HEAD % 100 + b"{")[: rng.randrange(200)])
            time.sleep(rng.uniform(0, 2))

    def abuse(self, rng: random.Random) -> None:
        """Send a hostile request of the corpus."""
        sent = rng.choice(self.hostile)
        status, body = status_of(self.server.port, sent, _PATIENCE)
        # A refusal is lost where the server stops reading before the client has sent all.
        cut = status == 0 and len(sent.data) > _LARGE
        self.counts["of these cut off while sending"] += cut
        fine = sent.half or cut or status in sent.statuses
        assert fine, f"{sent.name}: status {status}, not {sent.statuses}: {body[:200]!r}"
        time.sleep(0.02)

    def run(self) -> None:
        """Run all clients until the end."""
        # Those that ask for much work would leave none for the others to be measured by.
        self.hostile = [
            sent
            for sent in requests(self.secret)
            if (len(sent.data) < 2_000_000 or sent.statuses == (413,))
            and not sent.name.startswith("to answer: ")
        ]
        kinds = [("answers", self.good)] * _CLIENTS + [("hang-ups", self.hang_up)]
        kinds += [("half requests", self.half)] * 2 + [("hostile requests", self.abuse)] * 2
        threads = [
            threading.Thread(target=self._until_the_end, args=(what, act, seed))
            for seed, (what, act) in enumerate(kinds)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self.memory.append((time.monotonic(), memory_of(self.server.process.pid)))
            if self.server.process.poll() is not None:
                self.lost.append(f"the server ended with {self.server.process.returncode}")
                self.end = 0
            time.sleep(0.5)
        for thread in threads:
            thread.join()

    def growth(self) -> int:
        """Return the bytes of memory gained from the second quarter of the time to the last."""
        begin = self.end - self.seconds

        def median(first: float, last: float) -> int:
            times = (begin + first * self.seconds, begin + last * self.seconds)
            found = sorted(n for at, n in self.memory if times[0] <= at <= times[1])
            return found[len(found) // 2] if found else 0

        return median(0.75, 1) - median(0.25, 0.5)


def main() -> None:
    """Run, print the counts, and exit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800, help="how long")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    secret = root / "secret.txt"
    secret.write_text("a secret")
    try:
        model = convert(GOLDEN / "clex_llama", root / "model", dtype="float32")
        assert model is not None
        soak = Soak(model, secret, args.seconds)
        try:
            soak.run()
        finally:
            soak.server.process.terminate()
            _, log = soak.server.process.communicate(timeout=60)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    growth, highest = soak.growth(), max((n for _, n in soak.memory), default=0)
    if growth > _GROWTH and args.seconds >= _WARM:
        soak.lost.append(f"the server's memory grew by {growth >> 20} MB")
    if "Traceback" in log:
        soak.lost.append(f"a traceback in the log: {log[-1000:]}")
    counts = ", ".join(f"{n} {what}" for what, n in sorted(soak.counts.items()))
    for fault in itertools.islice(soak.lost, 20):
        print(f"LOST   {fault}")
    print(
        f"{args.seconds:g} s: {counts}; memory {highest >> 20} MB at most, "
        f"{growth / 2**20:+.1f} MB from the second quarter to the last; {len(soak.lost)} lost."
    )
    sys.exit(bool(soak.lost))


if __name__ == "__main__":
    main()
