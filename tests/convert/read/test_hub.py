"""Download from the hub and upload to it, against a server on this machine.

The hub's address is read when huggingface_hub is imported, so each command runs in a
process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_clex import bundled
from mlx_clex.loading import CONVERSION

from ...conftest import GOLDEN
from ...hub_server import COMMIT, Hub, running
from .test_gguf_file import tiny_gguf

# Runs one command a line of its input, so that slow imports happen once.
WORKER = """
import contextlib, io, json, os, sys, traceback
import mlx_clex
from mlx_clex.commands.run_command import run_command
from mlx_clex.convert.__main__ import add_arguments, run
from mlx_clex.diagnosis.source import find_source

for line in sys.stdin:
    argv, env = json.loads(line)
    os.environ.update(env)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
        try:
            if argv[0] == "load":
                mlx_clex.load(argv[1], cache_dir=argv[2])
                status = 0
            elif argv[0] == "find":
                print(find_source(argv[1]).path)
                status = 0
            else:
                status = run_command(
                    add_arguments, run, prog="mlx_clex.convert", description="", argv=argv
                )
        except BaseException:
            traceback.print_exc()
            status = -1
    print(json.dumps([status, err.getvalue()]), flush=True)
"""


class Worker:
    """A process whose hub is the server of this module."""

    def __init__(self, hub: Hub, home: Path) -> None:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, *argv: str | Path, login: bool = True) -> tuple[int, str]:
        """Exit status and what was printed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = json.dumps(
            [[str(arg) for arg in argv], {"HF_TOKEN": "hf_anything" if login else ""}]
        )
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        status, printed = json.loads(self.process.stdout.readline())
        return status, printed


@pytest.fixture(scope="module")
def hub():
    """A hub in a thread."""
    with running() as hub:
        yield hub


@pytest.fixture(autouse=True)
def _up(hub):
    """Each test finds the hub up."""
    hub.down = False


@pytest.fixture(scope="module")
def convert(hub, tmp_path_factory):
    """The convert command in a process of its own."""
    worker = Worker(hub, tmp_path_factory.mktemp("home"))
    yield worker
    worker.process.kill()
    worker.process.communicate()


@pytest.fixture
def repo(hub, tmp_path):
    """Return a new repository with a golden checkpoint and third-party code."""
    folder = tmp_path / "served"
    shutil.copytree(GOLDEN / "clex_llama_gqa_log_scale", folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "modeling_llama.py").write_text("raise SystemExit('ran')")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}')
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    name = f"someone/{tmp_path.name}"
    hub.repos[name] = folder
    hub.ranges.clear()
    hub.requested.clear()
    return name


def test_only_what_is_needed_is_downloaded(hub, convert, repo, tmp_path):
    """Python files and weights in a second format must not be downloaded."""
    status, printed = convert(
        "--hf-path", repo, "--revision", "main", "--mlx-path", tmp_path / "out"
    )

    assert status == 0, printed
    fetched = {name for name, _ in hub.ranges}
    assert {"config.json", "tokenizer.model", "model-00001-of-00002.safetensors"} <= fetched
    assert not fetched & {"modeling_llama.py", "pytorch_model.bin", "golden.safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"]["log_scale"] is True
    template = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    assert template.read_text() == "tools"
    assert f"base_model: {repo}" in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_downloads_no_weights(hub, convert, repo, tmp_path):
    """--dry-run must not download 90 GB of weights."""
    status, printed = convert("--hf-path", repo, "--mlx-path", tmp_path / "out", "--dry-run")

    assert status == 0, printed
    assert "model-00001-of-00002.safetensors: 153,080 bytes" in printed
    assert "modeling_llama.py" not in printed
    assert {name for name, _ in hub.ranges} <= {"model.safetensors.index.json"}
    assert not (tmp_path / "out").exists()


def test_what_was_fetched_serves_without_a_network(hub, convert, repo, tmp_path):
    """Without a network, a checkpoint in the hub's cache must be enough."""
    assert convert("--hf-path", repo, "--mlx-path", tmp_path / "out")[0] == 0
    hub.down = True
    status, printed = convert("--hf-path", repo, "--mlx-path", tmp_path / "again")

    assert status == 0, printed


def test_a_download_resumes_where_it_was_cut(hub, convert, repo, tmp_path):
    """An interrupted download of 90 GB must not start from zero."""
    folder = hub.repos[repo]
    file = folder / "model-00001-of-00002.safetensors"
    shutil.copy(file, tmp_path / "small")
    tensors: Any = mx.load(str(tmp_path / "small"), format="safetensors")
    # The client writes ten megabytes at a time, so a cut before those loses them.
    tensors["model.embed_tokens.weight"] = mx.zeros((200_000, 64), mx.bfloat16)
    mx.save_safetensors(str(file), tensors)
    other: Any = mx.load(str(folder / "model-00002-of-00002.safetensors"))
    other.pop("lm_head.weight")
    mx.save_safetensors(str(folder / "model-00002-of-00002.safetensors"), other)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 200_000, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    hub.cut[file.name] = 15_000_000

    status, printed = convert("--hf-path", repo, "--mlx-path", tmp_path / "out")

    assert status == 0, printed
    first, second = (wanted for name, wanted in hub.ranges if name == file.name)
    assert first == ""
    assert 10_000_000 <= int(second.removeprefix("bytes=").partition("-")[0]) <= 15_000_000


def test_a_shard_missing_on_the_hub_is_named(hub, convert, repo, tmp_path):
    """The list of files shows it, before anything large is downloaded."""
    (hub.repos[repo] / "model-00002-of-00002.safetensors").unlink()

    status, printed = convert("--hf-path", repo, "--mlx-path", tmp_path / "out")

    assert status == 2
    assert "lacks model-00002-of-00002.safetensors" in printed
    assert not [name for name, _ in hub.ranges if name.endswith(".safetensors")]
    assert not (tmp_path / "out").exists()


def test_what_the_hub_has_not_is_named(convert, repo, tmp_path):
    """One line instead of the hub's own traceback."""
    target = ("--mlx-path", tmp_path / "out")

    status, printed = convert("--hf-path", "no/such-model", *target)
    assert (status, "neither a folder no/such-model" in printed) == (2, True), printed
    status, printed = convert("--hf-path", repo, "--revision", "v9", *target)
    assert (status, "no revision 'v9'" in printed) == (2, True), printed
    assert "Traceback" not in printed


def test_an_upload_keeps_our_card(hub, convert, tmp_path):
    """mlx-lm's upload would replace the card with the table of scales."""
    status, printed = convert(
        *("--hf-path", GOLDEN / "clex_llama_gqa_log_scale", "--mlx-path", tmp_path / "out"),
        *("--upload-repo", "me/mine"),
    )

    assert status == 0, printed
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    uploaded = {name: data for name, data in hub.uploaded.items() if name != ".gitattributes"}
    assert uploaded == written
    assert b"| 33 to 64 | 2 |" in uploaded["README.md"]
    assert b"mlx_clex generate --model me/mine" in uploaded["README.md"]
    assert f"{hub.url}/me/mine" in printed


def test_an_upload_without_a_login_is_refused_at_once(convert, tmp_path):
    """It must be refused before the conversion, which can take hours."""
    status, printed = convert(
        *("--hf-path", GOLDEN / "clex_phi", "--mlx-path", tmp_path / "out"),
        *("--upload-repo", "me/mine"),
        login=False,
    )

    assert status == 2
    assert "hf auth login" in printed
    assert not (tmp_path / "out").exists()


def test_load_converts_a_hub_id_once_a_commit(convert, repo, tmp_path):
    """The Python function `load` must convert like the command."""
    for _ in range(2):
        status, printed = convert("load", repo, tmp_path / "cache")
        assert status == 0, printed

    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.endswith(f"{COMMIT[:12]}-{CONVERSION}")


def test_a_model_of_mlx_lm_loads_without_a_network(hub, convert, tmp_path):
    """It is not converted, so that only the hub's cache has it."""
    hub.repos["someone/mlx-model"] = bundled.folder("base")
    assert convert("find", "someone/mlx-model")[0] == 0
    hub.down = True
    status, printed = convert("load", "someone/mlx-model", tmp_path / "cache")
    assert (status, "has no weights" in printed) == (-1, True), printed  # only config.json is there
    hub.down = False
    assert convert("load", "someone/mlx-model", tmp_path / "cache")[0] == 0
    hub.down = True
    for command in (
        ("load", "someone/mlx-model", tmp_path / "cache"),
        ("find", "someone/mlx-model"),
    ):
        status, printed = convert(*command)
        assert status == 0, printed


def test_a_gguf_file_on_the_hub_loads_once(hub, convert, tmp_path):
    """Its repository has no config.json; without a network the download must be enough."""
    folder = tmp_path / "served"
    folder.mkdir()
    tiny_gguf(folder)
    hub.repos["someone/tiny-GGUF"] = folder

    status, printed = convert("find", "someone/tiny-GGUF")
    assert status == -1
    assert "is inside its .gguf file. Download that (hf download someone/tiny-GGUF)" in printed
    for name in ("cache", "cache", "another"):
        hub.down = name == "another"
        status, printed = convert("load", "someone/tiny-GGUF", tmp_path / name)
        assert status == 0, printed
        assert (tmp_path / name / f"someone--tiny-GGUF@{COMMIT[:12]}-{CONVERSION}").is_dir()
    status, printed = convert("find", "someone/tiny-GGUF")
    hub.down = False
    assert status == 0, printed
    assert printed.strip().endswith("tiny.gguf")

    shutil.copy(folder / "tiny.gguf", folder / "other.gguf")
    status, printed = convert("load", "someone/tiny-GGUF", tmp_path / "cache")
    assert "has several .gguf files (other.gguf, tiny.gguf): give the path of one" in printed
