"""The page in a real browser, as a user sees it.

    python -m tests.test_web MODEL docs/web.png

takes the picture in the README, with a model that can talk.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mlx_clex.serving.conversation import Context
from mlx_clex.web import meter

from .conftest import GOLDEN

SENTENCE = "The quick brown fox jumps over the lazy dog. "
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1200,820"),
)


def start(folder, *options, **pipes):
    """The command in a process, once it serves, and the page's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "mlx_clex.web", "--model", str(folder)]
    command += ["--port", str(port), *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **pipes)
    for line in process.stdout:
        if address in line:
            return process, address
    raise AssertionError("the page did not start")


class Page:
    """The command in a process, and its page in a headless Chromium."""

    def __init__(self, folder, *options):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        self.process, self.address = start(folder, *options)
        self.profile = tempfile.mkdtemp()
        chrome = webdriver.ChromeOptions()
        chrome.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"--user-data-dir={self.profile}"):
            chrome.add_argument(flag)
        chrome.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.browser = webdriver.Chrome(chrome, Service(shutil.which("chromedriver")))
        self.browser.get(self.address)

    def find(self, selector):
        """The first element, once it is there."""
        return self.until(lambda: self.browser.find_elements("css selector", selector))[0]

    def until(self, what, seconds=60):
        """The first true answer of `what`, asked again and again."""
        end = time.monotonic() + seconds
        while not (answer := what()):
            assert time.monotonic() < end, f"not in {seconds} s; the page: {self.text('body')}"
            time.sleep(0.05)
        return answer

    def text(self, selector):
        # Elements are replaced as the page changes, so it is asked in one script.
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return self.browser.execute_script(script, selector)

    def tokens(self):
        """How many the meter shows; -1 while it is not there."""
        figures = self.text("#meter .figures").split()
        return int(figures[0]) if figures else -1

    def send(self, message):
        self.find("#message textarea").send_keys(message + "\n")

    def drop(self, file):
        self.find("#document input[type=file]").send_keys(str(file))

    def requests(self):
        """The hosts that the browser asked for anything."""
        entries = [json.loads(e["message"])["message"] for e in self.browser.get_log("performance")]
        urls = [
            entry["params"]["request"]["url"]
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
        ]
        return {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}

    def close(self):
        self.browser.quit()
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()
        shutil.rmtree(self.profile, ignore_errors=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page over clex_llama, which reaches 256 tokens and has no chat template."""
    pytest.importorskip("gradio", reason="the page needs gradio, extra `web`")
    pytest.importorskip("selenium", reason="selenium drives the browser")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium or chromedriver is not installed")
    from mlx_clex.convert import convert

    folder = tmp_path_factory.mktemp("f32") / "m"
    convert(GOLDEN / "clex_llama", folder, dtype="float32")
    page = Page(folder, "--max-tokens", "40")
    yield page
    page.close()


def test_talk_drop_and_read(page, tmp_path):
    """Type, read the streamed answer, drop a document, run into the reach, start anew."""
    page.until(lambda: page.tokens() == 0)
    page.send("A cat.")
    page.until(lambda: page.tokens() > 20)
    assert "A cat." in page.text("#talk")

    (tmp_path / "fox.txt").write_text(SENTENCE * 2)
    before = page.tokens()
    page.drop(tmp_path / "fox.txt")
    page.until(lambda: "of fox.txt" in page.text("#note"))
    assert page.tokens() > before + 20
    assert "of 256 tokens" in page.text("#meter")
    assert page.find("#meter progress").get_attribute("value") == str(page.tokens())

    (tmp_path / "long.txt").write_text(SENTENCE * 30)
    before = page.tokens()
    page.drop(tmp_path / "long.txt")
    page.until(lambda: "this model reaches 256" in page.text("#note"))
    assert page.tokens() == before
    page.find("#new").click()
    page.until(lambda: page.tokens() == 0)
    page.send("A dog.")
    page.until(lambda: page.tokens() > 20)


def test_the_page_asks_for_nothing_elsewhere(page):
    """Fonts came from a content network, and statistics went to another."""
    page.until(lambda: page.tokens() >= 0)
    assert page.requests() <= {"127.0.0.1"}


def test_ctrl_c_ends_an_answer_and_the_page():
    """The thread with the model ends after the pass under way, before the interpreter does."""
    gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio")
    process, address = start("bundled:gene", "--max-tokens", 100_000, stderr=subprocess.PIPE)
    client = gradio_client.Client(address, verbose=False)
    job = client.submit("A cat.", api_name="/send")
    end = time.monotonic() + 60
    while len(job.outputs()) < 3:
        assert time.monotonic() < end, "no answer"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "terminate" not in errors


@pytest.mark.parametrize(
    ("reach", "shown"), [(256, 'value="12" max="256"'), (None, "<b>12</b> no limit tokens")]
)
def test_the_meter(reach, shown):
    """A context without an end had a bar of no length."""
    assert shown in meter(Context(12, reach, reach is not None, 2.5, 1_500_000))


def picture(folder: str, file: str) -> None:
    """Ask about a document, and save what the page shows then."""
    page = Page(folder, "--max-tokens", "60")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            document = Path(scratch) / "library.txt"
            command = [sys.executable, "examples/long_document.py", "--characters", "3200"]
            document.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
            page.drop(document)
            page.until(lambda: "of library.txt" in page.text("#note"), seconds=300)
        read = page.tokens()
        page.send("What is the secret word of the library?")
        page.until(lambda: page.tokens() > read, seconds=100)
        page.until(lambda: "banana" in page.text("#talk"), seconds=100)
        time.sleep(3)
        page.browser.save_screenshot(file)
    finally:
        page.close()


if __name__ == "__main__":
    picture(*sys.argv[1:])
