"""Compare the answers and times of eight clients, one by one and all at once.

    python -m benchmarks.parallel_clients --model build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The benchmark converts the model to float32 with a trained length of 1,024 tokens and serves
it. It sends prompts of 100 to 6,000 tokens through the openai package, each at its own scale:
first one by one, then all at once. It needs the extra `dev`.
"""

import argparse
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

LENGTHS = (100, 300, 700, 1000, 1500, 2500, 4000, 6000)  # approximate prompt lengths, tokens
TRAINED = 1024  # --trained-length of the conversion, tokens
# The Linux CPU build of MLX gets its fast matrix product from mlx_clex; stock must have it too.
WITH_BLAS = """
import runpy, sys
from mlx_clex._blas import use_openblas
use_openblas()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
WORDS = ["river", "stone", "lamp", "garden", "winter", "paper", "bridge", "copper", "orchard"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="a folder, a .gguf file or a Hugging Face id"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=20, help="length limit of an answer (default: 20)"
    )
    parser.add_argument("--quick", action="store_true", help="only prompts up to 1,500 tokens")
    args = parser.parse_args()
    lengths = LENGTHS[:5] if args.quick else LENGTHS
    prompts = [text(number, tokens) for number, tokens in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        convert = ("--hf-path", args.model, "--mlx-path", folder, "--dtype", "float32")
        scaling = ("--scaling", "clex", "--trained-length", TRAINED)
        run("mlx_clex.convert", *convert, *scaling)
        # Without a prompt cache, the second round must read every prompt again.
        with served(folder, "--prompt-cache-size", 0) as client:

            def ask(prompt: str) -> Any:
                started = time.perf_counter()
                done = client.completions.create(
                    model="default_model", prompt=prompt, max_tokens=args.max_tokens, temperature=0
                )
                return done.choices[0].text, done.usage, time.perf_counter() - started

            started = time.perf_counter()
            alone = [ask(prompt) for prompt in prompts]
            one_by_one = time.perf_counter() - started
            started = time.perf_counter()
            with ThreadPoolExecutor(len(prompts)) as pool:
                together = list(pool.map(ask, prompts))
            at_once = time.perf_counter() - started
    print("| prompt, tokens | alone, s | at once, s | same answer |\n|---|---|---|---|")
    for one, other in zip(alone, together, strict=True):
        same = "yes" if one[0] == other[0] else f"no: {one[0]!r}, {other[0]!r}"
        print(f"| {one[1].prompt_tokens} | {one[2]:.1f} | {other[2]:.1f} | {same} |")
    print(f"All, one by one: {one_by_one:.0f} s; at once: {at_once:.0f} s.")
    sys.exit(any(one[0] != other[0] for one, other in zip(alone, together, strict=True)))


def text(seed: int, tokens: int) -> str:
    """Return English text of about `tokens` tokens, which depends only on the seed."""
    rng = random.Random(seed)
    lines = []
    for number in range(tokens // 12):
        first, second = rng.sample(WORDS, 2)
        lines.append(f"{number}. The {first} lay beside the {second}. ")
    return "".join(lines) + "In short,"


def first_tokens(client: OpenAI, prompts: list[str], max_tokens: int = 20) -> list[float]:
    """Return the seconds to the first token of answers to prompts that are sent at once."""
    started = time.perf_counter()

    def ask(prompt: str) -> float:
        stream = client.completions.create(
            model="default_model",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
        )
        seconds = [time.perf_counter() - started for chunk in stream if chunk.choices]
        return seconds[0]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


@contextmanager
def served(folder: Path, *options: object, module: str = "mlx_clex.server") -> Iterator[OpenAI]:
    """Start a server and yield a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["--model", folder, "--port", port, "--log-level", "WARNING", *options]
    server = subprocess.Popen(
        [sys.executable, "-c", WITH_BLAS, module, *map(str, command)], stdout=subprocess.DEVNULL
    )
    try:
        while True:
            if server.poll() is not None:
                sys.exit("The server did not start.")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                break
            except OSError:
                time.sleep(0.2)
        yield OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=3600
        )
    finally:
        server.terminate()
        server.wait()


def run(module: str, *options: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, options)], check=True)


if __name__ == "__main__":
    main()
