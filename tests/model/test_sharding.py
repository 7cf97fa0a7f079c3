"""Two processes of mlx.launch give the tokens of one."""

import argparse
import concurrent.futures
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_clex.convert import convert
from mlx_lm.generate import stream_generate
from mlx_lm.models import qwen2
from mlx_lm.utils import save_model

from mlx_clex import load, make_prompt_cache, server
from mlx_clex.errors import InputError

from .. import run_generate
from ..conftest import GOLDEN
from ..served import text_after

LAUNCH = shutil.which("mlx.launch", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
PROMPT = "The quick brown fox jumps over the lazy dog. " * 3

pytestmark = [
    pytest.mark.skipif(LAUNCH is None, reason="mlx.launch is not installed"),
    pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="mlx has no ring back end"),
]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_free_ports():
    """The first of two ports in a row, below those the system hands out."""
    for port in random.sample(range(10_000, 30_000, 2), 100):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
        return port
    raise AssertionError("no two free ports in 100 tries")


def launch(*command):
    """Run a command in two processes that find each other on this machine.

    mlx.launch ends with status 0 when its processes do not. One that starts long after the other,
    on a busy machine, does not find it; a second start does.
    """
    for _ in range(2):
        with launched(*command) as process:
            out, err = process.communicate(timeout=240)
        if "[ring]" not in err:
            break
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def launched(*command):
    """The running mlx.launch; it is interrupted, as by Ctrl-C, unless it has ended."""
    port = two_free_ports()
    process = subprocess.Popen(
        [str(LAUNCH), "-n", "2", "-p", str(port), "--", sys.executable, *map(str, command)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group to interrupt
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Float32 models that mlx-lm can share out, by heads or by layers."""
    top = tmp_path_factory.mktemp("sharded")
    made = {
        name: convert(GOLDEN / name, top / name, dtype="float32")
        for name in ("clex_llama", "clex_llama_gqa_log_scale", "gene_param_llama", "clex_phi")
    }
    mx.random.seed(0)
    args = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=512,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = qwen2.Model(args)
    for layer in model.layers:
        # Sharper attention than fresh weights give, so that a wrong rotation shows.
        layer.self_attn.q_proj.weight *= 4
        layer.self_attn.k_proj.weight *= 4
    save_model(top / "stock", model)
    (top / "stock" / "config.json").write_text(json.dumps(vars(args)))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "clex_llama" / name, top / "stock")
    made["qwen2"] = convert(top / "stock", top / "qwen2", scaling={"type": "clex"})
    return made


def test_two_processes_give_the_tokens_of_one(folders, tmp_path):
    """Split by heads (also gene-param) and by layers; models that cannot be split are refused."""
    runs = [
        (("clex_llama",), ()),
        (("clex_llama",), ("--scale", "5.5")),
        (("clex_llama_gqa_log_scale",), ("--prefill-step-size", "20")),
        (("gene_param_llama",), ()),
        (("qwen2",), ()),
        (("qwen2",), ("--pipeline",)),
        (("qwen2",), ("--pipeline", "--scale", "5")),
    ]
    refused = [
        ("clex_llama", ("--pipeline",), ["pipeline parallel", "leave out --pipeline"]),
        ("clex_phi", (), ["tensor parallel", "phi"]),
        ("clex_llama", ("--adapter-path", "/nowhere"), ["fuse them first"]),
        ("clex_llama", ("--prompt-cache-file", "/nowhere"), ["--prompt-cache-file"]),
    ]
    base = ("--prompt", PROMPT, "-m", "30", "--temp", "0")
    argvs = [["--model", str(folders[name]), *base, *args] for (name,), args in runs]
    sampled = ["--model", str(folders["clex_llama"]), "--prompt", "A", "-m", "30", "--temp", "1.5"]
    argvs.append(sampled)
    argvs += [["--model", str(folders[name]), *base, *args] for name, args, _ in refused]
    (tmp_path / "runs.json").write_text(json.dumps(argvs))

    done = launch(run_generate.__file__, tmp_path)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr
    first, second = (json.loads(file.read_text()) for file in files)
    (tmp_path / "runs.json").write_text(json.dumps(argvs[: len(runs)]))
    run_generate.main(str(tmp_path))
    alone = json.loads((tmp_path / "rank0.json").read_text())

    for argv, mine, other, one in zip(argvs, first, second, alone, strict=False):
        assert mine[0] == other[0] == one[0] == 0, mine[2] + one[2]
        assert text_of(mine[1]) == text_of(one[1]), argv
        assert other[1] == "", "the second process printed"
    assert first[len(runs)][0] == second[len(runs)][0] == 0, "sampling, with one seed for both"
    for (_, _, words), mine in zip(refused, first[len(runs) + 1 :], strict=True):
        assert mine[0] == 2
        assert all(word in mine[2] for word in words), mine[2]
        assert len(mine[2].strip().splitlines()) == 1


def test_the_command_under_mlx_launch(folders):
    """Under mlx.launch one process prints, and both end."""
    options = ("--model", folders["gene_param_llama"], "--prompt", PROMPT, "-m", "5")
    done = launch("-m", "mlx_clex.generate", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Generation: 5 tokens") == 1


@contextmanager
def serving(*options):
    """Yield a function that posts a completion request to a server of two processes."""
    port = free_port()
    command = ("-m", "mlx_clex.server", "--port", port, "--log-level", "WARNING")
    with launched(*command, *options) as process:

        def ask(path="/v1/completions", method="POST", **body):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        while True:
            assert process.poll() is None, process.stderr.read()
            try:
                assert ask("/health", "GET")[0] == 200
                break
            except OSError:
                time.sleep(0.1)
        ask.port = port
        yield ask
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=240)[1].count("Traceback") == 1, "mlx.launch's own"


def answers_of(folder):
    """Return a function from a prompt to the answer of one process."""
    model, tokenizer = load(folder)

    def answer(prompt):
        ids = tokenizer.encode(prompt)
        cache = make_prompt_cache(model, len(ids))
        parts = stream_generate(model, tokenizer, ids, max_tokens=12, prompt_cache=cache)
        return text_after(tokenizer, ids, parts)

    return answer


BAD = [
    (400, {"prompt": PROMPT * 30}),
    (400, {"prompt": "A", "logit_bias": {"99999": 1}}),
    (404, {"prompt": "A", "model": "/nowhere"}),
    (404, {"prompt": "A", "adapters": "/nowhere"}),
]


@pytest.mark.parametrize("options", [("clex_llama",), ("qwen2", "--pipeline")])
def test_a_server_of_two_processes_answers_as_one(options, folders):
    """Both processes must use the same plan for every request."""
    name, *rest = options
    alone = answers_of(folders[name])
    prompts = [PROMPT, "A cat.", PROMPT + "And", "B " + PROMPT]
    expected = [alone(prompt) for prompt in prompts]
    with serving("--model", folders[name], *rest) as ask:

        def text(prompt, **more):
            status, body = ask(prompt=prompt, max_tokens=12, temperature=0, **more)
            assert status == 200, body
            return json.loads(body)["choices"][0]["text"]

        assert [text(prompt) for prompt in prompts] == expected
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(text, prompts)) == expected
        assert text(PROMPT, seed=1) == expected[0], "outside of a batch"
        for status, body in BAD:
            assert ask(**body)[0] == status, body
        for more in ({}, {"seed": 1}):
            hang_up(ask.port, prompt=PROMPT, max_tokens=30, stream=True, **more)
        assert text(PROMPT) == expected[0]


def hang_up(port, **body):
    """Send a request, and leave when the answer begins."""
    data = json.dumps(body)
    with socket.create_connection(("127.0.0.1", port), timeout=240) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        connection.sendall((head + data).encode())
        connection.recv(200)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["--model"]),
        (("--model", "x", "--draft-model", "x"), ["--draft-model", "one process"]),
        (("--model", "x", "--allow-model", "y"), ["--allow-model", "one process"]),
        (("--model", "x", "--pipeline", "--prompt-cache-bytes", "1GB"), ["--prompt-cache-bytes"]),
    ],
)
def test_options_that_several_processes_cannot_have(options, words):
    """With these options the processes would diverge or hang."""
    parser = argparse.ArgumentParser()
    server.add_arguments(parser)
    args = parser.parse_args(options)
    with pytest.raises(InputError) as error:
        server.check_processes(args, 2)
    assert all(word in str(error.value) for word in words)


def test_a_server_whose_model_cannot_be_shared_out_ends(folders):
    """One line of each process says why, before any of them listens."""
    done = launch("-m", "mlx_clex.server", "--model", folders["clex_llama"], "--pipeline")
    lines = [line for line in done.stderr.splitlines() if line.startswith("mlx_clex server:")]
    assert lines, done.stderr
    assert all("leave out --pipeline" in line for line in lines)
    assert "Traceback" not in done.stderr


def text_of(out):
    return out.split("=" * 10)[1].strip("\n")
