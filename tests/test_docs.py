"""Every command of README.md and docs/ runs as it is typed.

Each page has a fresh folder, which is also its HOME, with `base-model`, `llama3-model` (its rope
is stretched) and `book.txt` in it; blocks run in order. Published ids are answered by a hub on
this machine, which serves the golden checkpoints under those names.

Not covered: installing. Of those blocks the extras are looked up in pyproject.toml.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from .conftest import GOLDEN
from .hub_server import Hub, running

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

# What the hub of the tests serves under the published names.
PUBLISHED = {
    "DAMO-NLP-SG/CLEX-7B-16K": "clex_llama",
    "DAMO-NLP-SG/CLEX-7B-Chat-16K": "clex_llama",
    "DAMO-NLP-SG/CLEX-LLaMA-2-7B-64K": "clex_llama_gqa_log_scale",
    "DAMO-NLP-SG/CLEX-Phi-2-32K": "clex_phi",
    "DAMO-NLP-SG/CLEX-Mixtral-8x7B-32K": "clex_mixtral",
    "DAMO-NLP-SG/CLEX-Mixtral-8x7B-Chat-32K": "clex_mixtral",
    "voolxanQED/llama2-gene-64k-base": "gene_llama",
    "voolxanQED/llama2-gene-64k-chat": "gene_llama",
}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND_IN_TABLE = re.compile(r"^\|.*`(mlx_clex [^`]+)` \|$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)]+)\)")
INSTALL = re.compile(r"\b(git clone|pip install|brew install)\b")
EXTRAS = re.compile(r"\.\[([\w,]+)\]|mlx[-_]clex\[([\w,]+)\]")
SERVING = {"server": 8080, "web": 7860}  # command -> the port that the pages name


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with the published ids."""
    top = tmp_path_factory.mktemp("hub")
    with running() as hub:
        for repo, name in PUBLISHED.items():
            folder = top / repo
            leave_out = shutil.ignore_patterns("golden.safetensors")
            shutil.copytree(GOLDEN / name, folder, ignore=leave_out)
            hub.repos[repo] = folder
        yield hub


@dataclass
class Reader:
    """Somebody who types what a page says."""

    folder: Path
    hub: Hub
    fonts: Path  # matplotlib's list of fonts, which takes seconds to make
    ports: dict[int, int] = field(default_factory=dict)  # what a page says -> what is free
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """No network but the hub of this module, and no home but the folder."""
        dropped = ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "MPLCONFIGDIR": str(self.fonts),
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def follow(self, page: str) -> None:
        """Run the blocks of a page."""
        blocks = BLOCK.findall(page)
        for index, (language, code) in enumerate(blocks):
            if language == "python":
                self.run([sys.executable, "-c", code], code)
            elif language == "bash" and INSTALL.search(code):
                check_extras(code)
            elif language == "bash":
                lines = blocks[index + 1][1] if index + 1 < len(blocks) else ""
                self.type(code, lines)

    def type(self, code: str, next_block: str) -> None:
        """Run a block of shell commands; what waits for a client goes on in the background."""
        command = re.match(r"mlx_clex (\w+)", code.splitlines()[-1])
        name = command[1] if command else ""
        if name in SERVING:
            self.serve(code.strip(), SERVING[name])
        elif name == "chat":
            lines = re.findall(r"^> (.*)$", next_block, re.MULTILINE)
            assert lines, "a chat needs a block after it with the lines to type, each after >"
            said = self.run(self.shell(code), code, typed="\n".join(lines) + "\n")
            assert "error:" not in said, said
        else:
            self.run(self.shell(code), code)

    def shell(self, code: str) -> list[str]:
        """The command line of a block, with the ports of the servers started here."""
        for named, free in self.ports.items():
            code = code.replace(f":{named}", f":{free}")
        return ["bash", "-euo", "pipefail", "-c", code]

    def run(self, command: list[str], code: str, typed: str = "") -> str:
        """What a command printed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            input=typed,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, code: str, port: int) -> None:
        """Start a server on a free port, and wait until it listens."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.ports[port] = probe.getsockname()[1]
        log = self.folder / "server.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                self.shell(f"exec {code} --port {self.ports[port]}"),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.started.append(process)
        for _ in range(1200):
            assert process.poll() is None, f"{code}\n{log.read_text()}"
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.ports[port]), timeout=1).close()
                return
            time.sleep(0.1)
        raise AssertionError(f"{code}\ndid not listen\n{log.read_text()}")

    def leave(self) -> None:
        """End the servers."""
        for process in self.started:
            process.send_signal(signal.SIGINT)
        for process in self.started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def reader(tmp_path: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A reader in a folder with the files that pages assume."""
    _make_base_model(tmp_path / "base-model")
    _make_llama3_model(tmp_path / "base-model", tmp_path / "llama3-model")
    book = "".join(f"Line {n} of the book. " for n in range(6))
    (tmp_path / "book.txt").write_text(book)
    someone = Reader(tmp_path, hub, tmp_path_factory.getbasetemp() / "fonts")
    yield someone
    someone.leave()


def check_extras(code: str) -> None:
    """Look the extras of an install block up in pyproject.toml."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = known["optional-dependencies"]
    for groups in EXTRAS.findall(code):
        for extra in "".join(groups).split(","):
            assert extra in known, f"there is no extra {extra}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_in_order(page, reader):
    """A command on a page had an option that does not exist."""
    text = page.read_text()
    if not BLOCK.search(text):
        pytest.skip("a page without commands")
    reader.follow(text)


def test_published_checkpoints_convert(reader):
    """A hub id in the table of published checkpoints led to nothing."""
    commands = COMMAND_IN_TABLE.findall(README.read_text())
    assert len(commands) == len(PUBLISHED)
    for index, command in enumerate(commands):
        assert f"https://huggingface.co/{command.split()[-1]})" in README.read_text()
        reader.run(reader.shell(f"{command} --mlx-path model-{index}"), command)


def test_readme_is_short():
    """The README had grown until nobody read it."""
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1000


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """A link pointed to a file, or to a heading, that had moved."""
    for link in LINK.findall(page.read_text()):
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not heading or heading in _headings(target), link


def _headings(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_each_page_is_linked_from_the_readme():
    """A page could be found by its file name only."""
    links = LINK.findall(README.read_text())
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links}
    assert set(PAGES) - linked == {README}


def _make_base_model(folder: Path) -> None:
    """A tiny plain LLaMA in mlx-lm's format, out of a golden checkpoint."""
    source = GOLDEN / "clex_llama_gqa_log_scale"
    folder.mkdir()
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_scaling", "auto_map", "log_scale"):
        config.pop(key)
    config["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    weights: dict[str, Any] = {}
    for shard in source.glob("model-*.safetensors"):
        loaded: Any = mx.load(str(shard))
        weights |= loaded
    plain = {name: tensor for name, tensor in weights.items() if "clex_layer" not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), plain, metadata={"format": "pt"})


def _make_llama3_model(base: Path, folder: Path) -> None:
    """The base model with a rope that is stretched as in Llama 3.1, from 64 tokens to 512."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 512
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
