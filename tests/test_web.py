"""The page in a real browser, as a user sees it.

    python -m tests.test_web MODEL docs/web.png

takes the picture of docs/chat-and-serve.md, with a model that can talk.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import mlx.core as mx
import pytest

from mlx_clex.serving.conversation import Context
from mlx_clex.serving.page import Read, meter

from .conftest import GOLDEN

SENTENCE = "The quick brown fox jumps over the lazy dog. "
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1280,800"),
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
        self.resize(1280, 800)
        self.browser.get(self.address)

    def resize(self, width, height):
        """Give the page, without the window's frame, this size."""
        self.browser.set_window_size(width, height)
        inner = self.browser.execute_script("return [innerWidth, innerHeight]")
        self.browser.set_window_size(2 * width - inner[0], 2 * height - inner[1])

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
        return int(figures[0].replace(",", "")) if figures else -1

    def box(self, selector):
        """Top and bottom of an element, in pixels from the window's top."""
        script = "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        return self.browser.execute_script(script + "return [b.top, b.bottom]", selector)

    def send(self, message):
        self.until(self.sendable)
        self.find("#message textarea").send_keys(message + "\n")

    def sendable(self):
        """Whether the button to send is there; before, Enter does nothing."""
        return bool(self.browser.find_elements("css selector", "#message .submit-button"))

    def drop(self, *files):
        self.find("#document input[type=file]").send_keys("\n".join(map(str, files)))

    def written(self):
        """What stands in the box for messages."""
        return self.find("#message textarea").get_attribute("value")

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
def in_float32(tmp_path_factory):
    """A function from a golden checkpoint to a folder of it that a test may change."""
    from mlx_clex.convert import convert

    def make(name):
        folder = tmp_path_factory.mktemp("f32") / name
        convert(GOLDEN / name, folder, dtype="float32")
        return folder

    return make


@pytest.fixture(scope="module")
def never_ending(in_float32):
    """gene_llama, which has no reach, without a way to choose its end token."""
    folder = in_float32("gene_llama")
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    weights["lm_head.weight"][2] = 0  # others of the 512 tokens have a positive logit
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    return folder


@pytest.fixture(scope="module")
def browsing():
    """A function from a model and options to a page."""
    pytest.importorskip("gradio", reason="the page needs gradio, extra `web`")
    pytest.importorskip("selenium", reason="selenium drives the browser")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium or chromedriver is not installed")
    pages = []

    def start(folder, *options):
        pages.append(Page(folder, *options))
        return pages[-1]

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def page(browsing, in_float32):
    """The page over clex_llama, which reaches 256 tokens and has no chat template."""
    return browsing(in_float32("clex_llama"), "--max-tokens", "40")


@pytest.fixture(scope="module")
def endless(browsing, in_float32):
    """The page over gene_llama, which has no end, with a chat template."""
    template = (
        "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    folder = in_float32("gene_llama")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    options = ("--max-tokens", "8", "--prefill-step-size", "64", "--system-prompt", "Be brief.")
    return browsing(folder, *options)


@pytest.mark.parametrize("size", [(1280, 800), (900, 1200)])
def test_the_page_fills_the_window(page, size):
    """The talk was 420 pixels high, whatever the window."""
    page.resize(*size)
    page.until(lambda: page.tokens() >= 0)
    height = size[1]
    page.until(lambda: height - 20 < page.box("#message")[1] <= height)
    assert page.box("#talk")[1] - page.box("#talk")[0] > height - 200
    assert page.browser.execute_script("return document.documentElement.scrollHeight") <= height
    for part in ("#document", "#meter", "#new"):
        assert page.box(part)[1] <= height


def test_an_empty_page_says_what_to_do_first(page):
    """It was an empty rectangle."""
    page.find("#new").click()
    page.until(lambda: "Drop a text file" in page.text("#talk"))
    assert "up to 256 tokens" in page.text("#talk")
    assert "continues the text that you write" in page.text("#talk")
    assert not page.browser.find_elements("css selector", "#system")  # no chat template


def test_the_settings_are_used(endless):
    """System prompt, temperature and longest answer could be set at the start alone."""
    page = endless
    box = page.find("#system textarea")
    page.until(lambda: box.get_attribute("value") == "Be brief." and box.is_enabled())
    page.send("A cat.")
    page.until(lambda: page.tokens() > 0 and "Cut at the longest answer." in page.text("#note"))
    brief = page.tokens()
    page.until(lambda: not page.find("#system textarea").is_enabled())
    page.find("#new").click()
    page.until(lambda: page.tokens() == 0 and page.find("#system textarea").is_enabled())
    page.find("#system textarea").send_keys(" Answer in one word and no more.")
    most = page.find("#most input")
    most.clear()
    most.send_keys("20\t")
    page.send("A cat.")
    page.until(lambda: page.tokens() > brief + 12 + 5)
    most.clear()
    most.send_keys("0\t")
    page.send("A cat.")
    page.until(lambda: "must be at least 1 token" in page.text("#note"))


def test_there_is_one_way_to_start_anew(page):
    """A bin in the corner did the same as the button."""
    page.send("A cat.")
    page.until(lambda: page.tokens() > 20)
    buttons = page.browser.find_elements("css selector", "#talk button")
    names = [button.get_attribute("title") for button in buttons if button.is_displayed()]
    assert "Copy message" in names
    assert "Clear" not in names
    page.find("#new").click()
    page.until(lambda: page.tokens() == 0)


def test_reading_shows_its_progress_and_stops(endless, tmp_path):
    """The note said "Reading ..." for minutes."""
    page = endless
    page.find("#new").click()
    page.until(lambda: page.tokens() == 0)
    (tmp_path / "long.txt").write_text(SENTENCE * 3000)
    page.drop(tmp_path / "long.txt")
    page.until(lambda: "tokens/s" in page.text("#note"))
    done, total = (
        int(page.find("#note progress").get_attribute(name)) for name in ("value", "max")
    )
    assert 0 < done < total
    page.find("#stop").click()
    page.until(lambda: page.text("#note") == "Stopped.")
    assert page.tokens() == 0


def test_the_rate_is_that_of_the_time_gone_by():
    """It was told after the first pass alone, over no time."""
    assert Read(0, 2000, 0.0).bar().startswith("Reading: 0 of 2,000 tokens<")
    assert "1,500 of 2,000 tokens, 300 tokens/s" in Read(1500, 2000, 5.0).bar()


def test_what_comes_during_an_answer(slow, tmp_path):
    """The second of two documents was never read, "New conversation" waited for the answer to end,
    and a button stood there that did nothing."""
    page = slow
    page.send("In the beginning")
    page.until(lambda: not page.sendable())
    page.find("#message textarea").send_keys("And then\n")
    assert page.written() == "And then"
    page.until(lambda: "In the beginning" in page.text("#talk") and len(page.text("#talk")) > 100)
    page.find("#new").click()
    page.until(lambda: page.sendable() and "Drop a text file" in page.text("#talk"), seconds=10)
    assert page.written() == "And then"

    (tmp_path / "first.txt").write_text(SENTENCE * 60)
    (tmp_path / "second.txt").write_text(SENTENCE)
    page.drop(tmp_path / "first.txt")
    page.until(lambda: "tokens/s" in page.text("#note"))
    page.drop(tmp_path / "second.txt")
    page.until(lambda: "of second.txt" in page.text("#note"))
    assert "Drop File Here" in page.text("#document")


@pytest.fixture(scope="module")
def slow(browsing, never_ending):
    """The page over a model that reads in small steps and answers until it is stopped.

    A busy machine types and clicks for seconds, so what is interrupted must not end by itself.
    """
    return browsing(never_ending, "--max-tokens", "100000", "--prefill-step-size", "4")


@pytest.fixture
def fresh(slow, tmp_path):
    """The same, with an empty conversation and box, and two documents, the first one long."""
    slow.find("#new").click()
    slow.until(lambda: slow.tokens() == 0 and slow.sendable())
    slow.browser.refresh()
    slow.until(lambda: slow.tokens() == 0)
    (tmp_path / "first.txt").write_text(SENTENCE * 3000)
    (tmp_path / "second.txt").write_text(SENTENCE)
    return slow


def test_a_message_that_is_refused_comes_back(page):
    """It was nowhere any more."""
    page.find("#new").click()
    page.until(lambda: page.tokens() == 0 and page.sendable())
    long = SENTENCE * 150
    script = "const b = document.querySelector('#message textarea'); b.value = arguments[0];"
    script += "b.dispatchEvent(new Event('input', {bubbles: true}));"
    page.browser.execute_script(script, long)
    page.send("")
    page.until(lambda: "this model reaches 256" in page.text("#note"))
    page.until(lambda: page.written() == long)
    page.find("#message textarea").clear()


def test_a_question_waits_for_its_document(fresh, tmp_path):
    """Without the document it was answered all the same, and the reason was hidden."""
    fresh.drop(tmp_path / "first.txt")
    fresh.until(lambda: "tokens/s" in fresh.text("#note"))
    fresh.send("Who jumps?")
    fresh.find("#stop").click()
    fresh.until(lambda: "The document was not read." in fresh.text("#note"))
    assert fresh.tokens() == 0
    assert fresh.written() == "Who jumps?"


def test_a_new_conversation_drops_what_waits(fresh, tmp_path):
    """A document that waited was read first, and thrown away then."""
    fresh.drop(tmp_path / "first.txt")
    fresh.until(lambda: "tokens/s" in fresh.text("#note"))
    totals = re.compile(r"of ([\d,]+) tokens")
    first = totals.findall(fresh.text("#note"))
    (tmp_path / "second.txt").write_text(SENTENCE * 2000)
    fresh.drop(tmp_path / "second.txt")
    fresh.until(lambda: "second" in fresh.text("#document"))
    fresh.find("#new").click()
    told = []

    def ended():
        told.append(fresh.text("#note"))
        return told[-1] == "" and fresh.tokens() == 0

    fresh.until(ended)
    assert set(totals.findall("".join(told))) <= set(first)
    time.sleep(1)
    assert ended()


def test_documents_dropped_together_are_all_read(fresh, tmp_path):
    """Only the first was read, and the page did not say so. After a failure it names the rest."""
    (tmp_path / "first.txt").write_text(SENTENCE * 60)
    fresh.drop(tmp_path / "first.txt", tmp_path / "second.txt")
    fresh.until(lambda: "of first.txt. Read 36 tokens of second.txt." in fresh.text("#note"))
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\x00")
    fresh.drop(tmp_path / "odd.txt", tmp_path / "second.txt")
    fresh.until(lambda: "Not read: second.txt." in fresh.text("#note"))
    assert fresh.text("#note").startswith("odd.txt is no UTF-8 text")


def test_settings_are_those_in_use_after_a_reload(endless):
    """The page showed the system prompt of its start, and the next conversation had that."""
    page = endless
    page.find("#new").click()
    page.until(lambda: page.tokens() == 0 and page.find("#system textarea").is_enabled())
    for selector, value in (("#system textarea", "Be kind."), ("#most input", "7\t")):
        page.find(selector).clear()
        page.find(selector).send_keys(value)
    page.send("A cat.")
    page.until(lambda: page.tokens() > 7)
    page.browser.refresh()
    page.until(lambda: page.tokens() > 7)
    page.until(lambda: page.find("#system textarea").get_attribute("value") == "Be kind.")
    assert page.find("#most input").get_attribute("value") == "7"


def test_a_picture_in_a_text_is_not_fetched(page, tmp_path):
    """Fetching it tells its owner who reads the text, and could carry the answer away."""
    asked = []

    class Owner(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    owner = HTTPServer(("127.0.0.1", 0), Owner)
    threading.Thread(target=owner.serve_forever, daemon=True).start()
    try:
        page.find("#new").click()
        page.until(lambda: page.tokens() == 0)
        text = f"![seen](http://127.0.0.1:{owner.server_port}/seen.png)"
        (tmp_path / "<b>bold.txt").write_text(text)
        page.drop(tmp_path / "<b>bold.txt")
        page.until(lambda: "bold.txt" in page.text("#note") and page.tokens() > 0)
        page.until(lambda: page.browser.find_elements("css selector", "#talk img"))
        time.sleep(1)
        assert asked == []
        assert not page.browser.find_elements("css selector", "#note b")
    finally:
        owner.shutdown()
        owner.server_close()


def test_talk_drop_and_read(page, tmp_path):
    """Type, read the streamed answer, drop a document, run into the reach, start anew."""
    page.find("#new").click()
    page.until(lambda: page.tokens() == 0)
    page.send("A cat.")
    page.until(lambda: page.tokens() > 20)
    assert "A cat." in page.text("#talk")

    (tmp_path / "fox.txt").write_text(SENTENCE * 2)
    before = page.tokens()
    page.drop(tmp_path / "fox.txt")
    page.until(lambda: "of fox.txt" in page.text("#note"))
    assert page.tokens() > before + 20
    assert f"of 256 tokens, {page.tokens() / 256:.0%}" in page.text("#meter")
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


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_an_answer_and_the_page(ending, never_ending, tmp_path, monkeypatch):
    """The thread with the model ends after the pass under way, before the interpreter does.

    Documents that were dropped stayed behind.
    """
    (tmp_path / "kept").mkdir()
    (tmp_path / "fox.txt").write_text(SENTENCE)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "kept"))
    gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio")
    process, address = start(never_ending, "--max-tokens", 100_000, stderr=subprocess.PIPE)
    client = gradio_client.Client(address, verbose=False)
    document = gradio_client.handle_file(tmp_path / "fox.txt")
    assert "of fox.txt" in str(client.predict([document], api_name="/drop"))
    assert list((tmp_path / "kept").rglob("fox.txt"))
    job = client.submit("A cat.", api_name="/send")
    end = time.monotonic() + 60
    while len(job.outputs()) < 3:
        assert time.monotonic() < end, "no answer"
        time.sleep(0.05)
    process.send_signal(ending)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "terminate" not in errors
    assert not list((tmp_path / "kept").rglob("fox.txt"))


@pytest.fixture
def client(never_ending):
    """gradio's client of a page whose answers do not end."""
    gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio")
    process, address = start(never_ending, "--max-tokens", 100_000)
    try:
        yield gradio_client.Client(address, verbose=False)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def answering(client, updates):
    """An answer under way, once this many updates of the page have come."""
    answer = client.submit("A cat.", api_name="/send")
    while len(answer.outputs()) < updates:
        assert not answer.done()
        time.sleep(0.05)
    return answer


def test_what_is_asked_for_meanwhile_waits(client, tmp_path):
    """The end of an answer hid the note of a document that was dropped before it."""
    gradio_client = pytest.importorskip("gradio_client")
    (tmp_path / "fox.txt").write_text(SENTENCE)
    answer = answering(client, 3)
    dropped = client.submit([gradio_client.handle_file(tmp_path / "fox.txt")], api_name="/drop")
    time.sleep(2)
    assert dropped.outputs() == []
    client.predict(api_name="/set")  # the button to stop
    assert "Stopped." in answer.result(60)
    assert any("of fox.txt" in str(shown) for shown in dropped.result(60))


def test_a_long_answer_does_not_overwhelm_the_browser(client):
    """Every token drew the whole answer anew; after a page of text clicks waited for seconds."""
    begun = time.monotonic()
    answer = answering(client, 20)
    assert len(answer.outputs()) <= 10 * (time.monotonic() - begun) + 2
    client.predict(api_name="/set")  # the button to stop
    shown, written = answer.result(60)[0], answer.outputs()[-2][0]
    assert shown[1]["content"][0]["text"].startswith(written[1]["content"][0]["text"])


@pytest.mark.parametrize(
    ("reach", "shown"),
    [
        (256, 'value="12" max="256"'),
        (256, "<b>12</b> of 256 tokens, 5%"),
        (None, "<b>12</b> tokens, no limit"),
    ],
)
def test_the_meter(reach, shown):
    """A context without an end had a bar of no length."""
    assert shown in meter(Context(12, reach, reach is not None, 2.5, 1_500_000))


def picture(folder: str, file: str) -> None:
    """Ask about a document, and save what the page shows then."""
    page = Page(folder)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            document = Path(scratch) / "library.txt"
            command = [sys.executable, "examples/long_document.py", "--characters", "11500"]
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
