"""The chat in a real terminal, as a user types it."""

import json
import os
import re
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from mlx_clex.convert import convert

from mlx_clex.chat import main

from .conftest import GOLDEN

pexpect = pytest.importorskip("pexpect", reason="pexpect gives the test a terminal")

SENTENCE = "The quick brown fox jumps over the lazy dog. "
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """clex_llama in float32 with a chat template; it reaches 256 tokens."""
    folder = tmp_path_factory.mktemp("f32") / "m"
    convert(GOLDEN / "clex_llama", folder, dtype="float32")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """gene_llama in float32: no hard reach, no chat template, and answers without an end."""
    folder = tmp_path_factory.mktemp("f32") / "m"
    convert(GOLDEN / "gene_llama", folder, dtype="float32")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["lm_head.weight"][2] = 0  # the token that ends an answer
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


@pytest.fixture
def chat(tmp_path):
    """A function that starts the chat in a terminal of 120 columns."""
    started = []

    def start(folder, *options):
        command = ["-m", "mlx_clex.chat", "--model", str(folder), *map(str, options)]
        child = pexpect.spawn(
            sys.executable,
            command,
            cwd=tmp_path,
            timeout=60,
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(40, 120),
        )
        child.ptyproc.delayafterterminate = 1.0  # seconds; a busy machine ends it slowly
        started.append(child)
        prompt(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def prompt(child):
    """What is shown before the chat waits for the next line."""
    child.expect("\n> ")
    return child.before


def say(child, line):
    child.sendline(line)
    return prompt(child)


def tokens_of(shown):
    return int(re.findall(r"(\d+) tokens, (?:reach|no limit)", shown)[-1])


def test_a_talk_over_a_document(chat, model, tmp_path):
    """Load with a bar, ask, look at the context, start anew, leave with Ctrl-D."""
    (tmp_path / "fox.txt").write_text(SENTENCE * 3)
    child = chat(model, "-m", 10, "--prefill-step-size", 16)

    shown = say(child, "/load fox.txt")
    assert re.search(r"Reading: 100%\|█+\| (\d+)/\1 ", shown)
    read = tokens_of(shown)
    shown = say(child, "Who jumps?")
    assert "10 tokens, " in shown
    context = say(child, "/context")
    assert tokens_of(context) > read + 10
    assert re.search(r"reach 256, scale \d, 0\.\d MB of keys and values", context)
    assert "0 tokens" in say(child, "/reset") + say(child, "/context")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_the_bar_stands_before_the_first_pass(chat, model, tmp_path):
    """One chunk showed nothing, and then 100 % at 21 million tokens a second."""
    (tmp_path / "fox.txt").write_text(SENTENCE * 3)
    shown = say(chat(model), "/load fox.txt")
    bars = re.findall(r"Reading: +(\d+)%\|", shown)
    assert (bars[0], bars[-1]) == ("0", "100")
    rate = float(re.findall(r"([\d.]+)tok/s", shown)[-1])
    assert 1 < rate < 1_000_000
    assert "Reading" not in say(chat(model, "-m", 2), "A cat.")


def test_the_short_commands_of_mlx_lm(chat, endless, tmp_path):
    """q, r and h were sent to the model as messages."""
    child = chat(endless, "-m", 5)
    assert "q quits, r starts anew, h lists all commands" in child.before
    say(child, "A cat.")
    assert "\n/retry " in say(child, "h")
    assert "The context is empty." in say(child, "r")
    assert tokens_of(say(child, "/context")) == 0
    assert tokens_of(say(child, " r")) > 5
    child.sendline("q ")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_line_that_is_no_text_ends_no_conversation():
    """A terminal of another encoding ended the chat with a traceback."""
    command = [sys.executable, "-m", "mlx_clex.chat", "--model", "bundled:clex", "-m", "2"]
    done = subprocess.run(
        command,
        input=b"caf\xe9\nthe king\n/quit\n",
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    out = done.stdout.decode()
    assert out.count("error: The line is no UTF-8 text.") == 1
    assert "; 2 tokens, " in out
    assert done.stderr == b""


def test_retry_and_a_new_system_prompt(chat, model, endless):
    """The last answer is replaced; a system prompt starts anew."""
    child = chat(model, "-m", 10)
    assert "no answer to replace" in say(child, "/retry")
    answer = say(child, "Who jumps?")
    again = say(child, "/retry")
    assert spoken(again).split("\r\n", 1)[1] == spoken(answer).split("\r\n", 1)[1]
    assert tokens_of(again) == tokens_of(answer)
    assert "The system prompt is: none" in say(child, "/system")
    assert "The context is empty." in say(child, "/system Be brief.")
    assert tokens_of(say(child, "Who jumps?")) > tokens_of(answer)
    assert "The system prompt is: Be brief." in say(child, "/system")
    assert "needs a chat template" in say(chat(endless), "/system Be brief.")


def test_saved_in_one_process_and_restored_in_another(chat, model, endless, tmp_path):
    """The same context and the same next answer; another model refuses the file."""
    child = chat(model, "-m", 10)
    say(child, SENTENCE)
    assert "talk.safetensors (" in say(child, "/save talk.safetensors")
    context = tokens_of(say(child, "/context"))
    answer = say(child, "And then?")
    say(child, " /quit is a word")  # a message: it begins with a space
    child.sendline("/quit")
    child.expect(pexpect.EOF)

    again = chat(model, "-m", 10)
    assert tokens_of(say(again, "/restore talk")) == context
    assert spoken(say(again, "And then?")) == spoken(answer)
    other = chat(endless)
    refused = say(other, "/restore talk.safetensors")
    assert "cannot be used: made with another version of m (different config.json" in refused


def spoken(shown):
    """An answer without the line of figures."""
    return shown.rpartition("[")[0]


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(chat, endless):
    """It ended the program, and the document with it."""
    child = chat(endless, "-m", 100_000)
    child.sendline(SENTENCE)
    child.expect("dog. \r\n.{5}")
    child.send(CTRL_C)
    shown = prompt(child)
    assert "[stopped; " in shown
    kept = tokens_of(shown)
    assert tokens_of(say(child, "/context")) == kept > 20
    child.send(CTRL_C)
    assert "Ctrl-D or /quit" in prompt(child)
    child.sendline("More.")
    child.expect("More.\r\n.{5}")
    child.send(CTRL_C)
    assert tokens_of(prompt(child)) > kept


def test_ctrl_c_stops_reading(chat, endless, tmp_path):
    """Nothing of the file is in the context then."""
    (tmp_path / "long.txt").write_text(SENTENCE * 3000)
    child = chat(endless, "--prefill-step-size", 64)
    child.sendline("/load long.txt")
    child.expect("Reading: ")
    child.send(CTRL_C)
    assert "Stopped; the conversation is as it was before." in prompt(child)
    assert tokens_of(say(child, "/context")) == 0


def test_ctrl_c_ends_waiting_for_a_pipe(chat, endless, tmp_path):
    """Nothing but a kill ended it, and the conversation with it."""
    os.mkfifo(tmp_path / "pipe")
    child = chat(endless)
    child.sendline("/load pipe")
    time.sleep(1)
    child.send(CTRL_C)
    assert "Nothing to stop" in prompt(child)
    child.sendline("/quit now")
    child.expect(pexpect.EOF)


def test_a_hard_reach_is_one_line_and_the_chat_goes_on(chat, model, tmp_path):
    """The chat died with the error of the model."""
    (tmp_path / "long.txt").write_text(SENTENCE * 30)
    child = chat(model, "-m", 5)
    for line in ("/load long.txt", SENTENCE * 30):
        # A terminal takes no line of more than 4096 characters.
        shown = say(child, line).replace("\r\n", "")
        assert "this model reaches 256 (trained length 32 x max_factor 8)" in shown
        assert "Traceback" not in shown
    assert "[" in say(child, "A cat.")
    assert "[cut at" in say(child, "A dog.")


def test_commands_and_their_mistakes(chat, model):
    """/help lists what there is; what there is not is said in one line."""
    child = chat(model)
    shown = say(child, "/help")
    for command in ("/load", "/context", "/save", "/restore", "/reset", "/quit", "/retry"):
        assert f"\n{command} " in shown
    assert "There is no command /lod" in say(child, "/lod x")
    assert "/load needs a file" in say(child, "/load")
    assert "No such file" in say(child, "/load nothing.txt")
    assert "nothing to save" in say(child, "/save x")
    assert "is no file" in say(child, "/restore x")


def with_state(data, change):
    """The bytes of a saved conversation whose state is another text."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    metadata["0.conversation"] = change(json.loads(metadata["0.conversation"]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_a_broken_file_is_one_line_and_the_talk_stays(model, tmp_path, monkeypatch, capsys):
    """A name of 300 characters, or ~ before no user, ended the chat and lost the conversation."""

    def talk(*lines):
        """What the chat shows for each line."""
        shown, left = [], iter(lines)

        def ask(_):
            shown.append(capsys.readouterr().out.strip())
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", ask)
        assert main(["--model", str(model), "--max-tokens", "4"]) == 0
        return shown[1:]

    file = tmp_path / "talk.safetensors"
    talk("A cat.", f"/save {file}")
    whole = file.read_bytes()
    broken = {
        "deep": lambda _: "[" * 100_000,
        "deep_object": lambda _: '{"messages": ' * 20_000,
        "no_object": lambda _: "[1]",
        "types": lambda state: json.dumps({**state, "tokens": "abc"}),
        "control": lambda state: json.dumps({**state, "format": "\x1b[2J"}),
        "contents": lambda state: json.dumps({**state, "messages": [{"role": "user"}]}),
    }
    names = ["n" * 300, "~no-such-user/talk", "\x1b[2J", str(tmp_path)]
    for name, change in broken.items():
        names.append(str(tmp_path / f"{name}.safetensors"))
        (tmp_path / f"{name}.safetensors").write_bytes(with_state(whole, change))
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    names.append(str(tmp_path / "cut.safetensors"))

    lines = [line for name in names for line in (f"/restore {name}", "/context")]
    told = talk("A dog.", "/context", *lines, "And then?")
    for name, error, context in zip(names, told[2:-1:2], told[3:-1:2], strict=True):
        assert re.fullmatch(r"error: .*", error), f"{name}: {error}"
        assert error.isprintable(), name
        assert context == told[1], name
    plain = talk("A dog.", "/context", "And then?")
    assert told[-1].splitlines()[0] == plain[-1].splitlines()[0]

    def clearing(state):
        state["messages"][-1]["content"] = "\x1b[2J"
        return json.dumps(state)

    file.write_bytes(with_state(whole, clearing))
    assert talk(f"/restore {file}")[0].startswith("... \\x1b[2J\nRestored: ")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--seed", "1"), "No model"),
        (("--model", "m", "--max-kv-size", "9"), "--max-kv-size drops old text"),
        (("--model", "m", "--pipeline"), "several machines"),
        (("--model", "m", "--temp", "-1"), "--temp must be within"),
        (("--model", "m", "--max-tokens", "0"), "--max-tokens must be"),
        (("--model", "./nothing"), "There is no folder or file"),
    ],
)
def test_bad_options_are_one_line(options, reason, capsys):
    """Each is refused before the model is loaded."""
    assert main(options) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"mlx_clex chat: error: .*\n", err)
    assert reason in err
