"""Prompts that are the published ones, answers that no cached prefix changes, honest counts."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_clex import load, make_prompt_cache, passkey
from mlx_clex.commands.run_command import run_command
from mlx_clex.evaluation.results import read_results
from mlx_clex.passkey import TASKS, Reader

from .conftest import scaled_folders

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
COUNT = 6  # tokens of an answer; random models have near ties, and more would meet one


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a method's name to a folder: trained at 64 tokens, no end for most."""
    return scaled_folders(tmp_path_factory, factor=16)


@pytest.fixture
def tokenizer(folders):
    return load(folders("stock"))[1]


def call(*argv):
    argv = [str(arg) for arg in argv]
    return run_command(
        passkey.add_arguments, passkey.run, prog="passkey", description="", argv=argv
    )


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_passkey_prompt_is_that_of_the_paper():
    """Characters of garbage are cut off where they end, as published; depth 0.25 of 200."""
    text, key = passkey.hide_passkey(rng(), 0.25)
    garbage = " ".join([GRASS] * 9)
    assert text(200) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there.\n"
        f"{garbage[:50]}\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        f"{garbage[:150]}\nWhat is the pass key? The pass key is"
    )
    assert 1 <= int(key) <= 50_000


def test_the_number_prompt_is_that_of_infinitebench():
    """Ten digits, the sentences a line each."""
    text, key = passkey.hide_number(rng(), 0.5)
    assert text(4) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz "
        f"you about the important information there.\n\n{GRASS}\n{GRASS}\n"
        f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
        f"{GRASS}\n{GRASS}\n\nWhat is the sequence of digits?\n\nThe sequence of digits is"
    )
    assert re.fullmatch("[0-9]{10}", key)
    assert len(re.findall(r"(\d)\1*", key)) <= 5, "five digits, the others repeat a neighbour"


def test_the_value_prompt_is_that_of_infinitebench():
    """A JSON object with the pair at its depth."""
    text, value = passkey.hide_value(rng(), 0.5)
    prompt = text(6)
    head, data, question = re.fullmatch(
        r"(.*?)\n\nJSON data:\n(.*?)\n\nKey: (.*)", prompt, re.DOTALL
    ).groups()
    assert head == "Extract the value corresponding to the specified key in the JSON object below."
    pairs = json.loads(data)
    assert list(pairs.values()).index(value) == 3
    assert len(pairs) == 7
    key = next(name for name, content in pairs.items() if content == value)
    assert question == f'"{key}"\nThe value associated with the specified key is: '
    assert text(2).count(value) == 1, "a shorter text asks for the same"


@pytest.mark.parametrize("task", ["passkey", "number", "kv"])
@pytest.mark.parametrize("length", [500, 777, 1300])
def test_a_prompt_is_as_long_as_it_may_be(tokenizer, task, length):
    """It was off by up to a whole piece of filler."""
    hide = {"passkey": "hide_passkey", "number": "hide_number", "kv": "hide_value"}[task]
    prompt, fact = TASKS[task].draw(rng(length), tokenizer, length, 0.3)
    text, same = getattr(passkey, hide)(rng(length), 0.3)
    assert same == fact
    if task == "passkey":
        assert length - 2 <= len(prompt) <= length
    else:
        sizes = [len(tokenizer.encode(text(filler))) for filler in range(40)]
        assert len(prompt) == max(size for size in sizes if size <= length < sizes[-1])


@pytest.mark.parametrize(
    ("task", "reply", "found"),
    [
        ("passkey", " 123. Remember", True),
        ("passkey", " 1234", False),
        ("passkey", " 12 and 123", False),
        ("passkey", " a secret", False),
        ("number", "\n123", True),
        ("number", " 0123", False),
        ("kv", ' "123", "456"', True),
        ("kv", "it is: 1234", False),
        ("words", " 123.", True),
    ],
)
def test_what_counts_as_found(task, reply, found):
    """The first number, whole; or the value as a word of its own."""
    assert TASKS[task].found(reply, "123") is found


def plain_answer(folder, prompt):
    """Greedy decoding, every prompt from its beginning, planned for its own length."""
    model, tokenizer = load(folder)
    caches = make_prompt_cache(model, len(prompt))
    model(mx.array([prompt[:-1]]), cache=caches)
    tokens, last = [], prompt[-1:]
    for _ in range(COUNT):
        token = model(mx.array([last]), cache=caches)[0, -1].argmax().item()
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(token)
        last = [token]
    return tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("clex", True),
        ("dynamic", True),
        ("gene", True),
        ("yarn", True),
        ("stock", True),
        ("clex-log", False),  # the gain is that of the length, and no two are equal
    ],
)
def test_answers_with_and_without_reuse_are_identical(folders, name, shares):
    """Prefixes were kept whose keys were at the scale of another length."""
    folder = folders(name)
    model, tokenizer = load(folder)
    draw = TASKS["passkey"].draw
    prompts = [
        draw(rng((length, trial)), tokenizer, length, depth)[0]
        for length in (450, 500, 700)
        for depth in (1.0, 0.5)
        for trial in (0, 1)
    ]
    # One of another length at each step, so that the scale changes to and fro.
    prompts += prompts[::4]
    fresh = Reader(model, tokenizer, reuse=False)
    reader = Reader(model, tokenizer)
    starts = []
    for prompt in prompts:
        read = []
        assert reader.answer(prompt, COUNT, read.append) == fresh.answer(prompt, COUNT)
        starts.append(read[0])
    assert any(starts) is shares, starts
    plain = plain_answer(folder, prompts[-1])
    assert fresh.answer(prompts[-1], COUNT).strip() == plain.strip()


def test_a_deeper_fact_leaves_the_beginning_to_the_others(folders, tokenizer):
    """Read once: all that stands before the fact of any later prompt."""
    reader = Reader(load(folders("clex"))[0], tokenizer)
    for trial, depth in enumerate((1.0, 0.8, 0.8, 0.5)):
        prompt = TASKS["passkey"].draw(rng(trial), tokenizer, 500, depth)[0]
        read = []
        reader.answer(prompt, COUNT, read.append)
        if trial:
            assert "is the pass key" not in tokenizer.decode(prompt[: read[0]])
            assert "The pass key is" in tokenizer.decode(prompt[: read[0] + 40])


def test_a_quantised_cache_is_read_from_its_beginning(folders, tokenizer):
    """What was quantised when a token was read is not known afterwards."""
    model, _ = load(folders("clex"))
    reader = Reader(model, tokenizer, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    prompt = TASKS["passkey"].draw(rng(), tokenizer, 500, 1.0)[0]
    first = reader.answer(prompt, COUNT)
    read = []
    assert reader.answer(prompt, COUNT, read.append) == first
    assert read[0] == 0


class Truthful(Reader):
    """Tells the fact of every prompt but those in `wrong`."""

    wrong: tuple[int, ...] = ()
    calls = 0
    stop_at = -1

    def answer(self, prompt, max_tokens, progress=None):
        number = type(self).calls
        type(self).calls += 1
        if number == self.stop_at:
            raise KeyboardInterrupt
        text = self.tokenizer.decode(prompt)
        return "0" if number in self.wrong else re.search(r"key is (\d+)", text)[1]


@pytest.fixture
def truthful(monkeypatch):
    class Fresh(Truthful):
        pass

    monkeypatch.setattr(passkey, "Reader", Fresh)
    return Fresh


GRID = ("--lengths", 500, 400, "--depths", 0, 1, "--trials", 4)


def test_the_figures_are_counted_right(folders, truthful, tmp_path, capsys):
    """Two lengths, two depths, four trials; three wrong answers at known places."""
    truthful.wrong = (0, 1, 6)  # shortest length first, deepest fact first
    out = tmp_path / "out"
    assert call("--model", folders("clex"), *GRID, "--output", out) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "Task passkey, clex: share of facts found, by depth."
    assert table[1].split() == ["tokens", "scale", "0%", "100%", "all", "trials"]
    assert table[2].split() == ["400", "7", "0.75", "0.50", "0.62", "8"]
    assert table[3].split() == ["500", "8", "1.00", "1.00", "1.00", "8"]
    results = read_results(out, "passkey")
    row = results.find(length=400, depth=1.0)
    assert {key: row[key] for key in row if key != "model"} == {
        "task": "passkey",
        "label": "clex",
        "length": 400,
        "depth": 1.0,
        "trials": 4,
        "correct": 2,
        "accuracy": 0.5,
        "trained_length": 64,
    }
    assert (tmp_path / "out.csv").read_text().count("\n") == 5
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_an_interrupted_run_goes_on(folders, truthful, tmp_path, capsys):
    """Every answer counts once, and the rows are those of a run that was not interrupted."""
    base = ("--model", folders("clex"), *GRID, "--output")
    truthful.wrong = (0, 6)
    assert call(*base, tmp_path / "whole") == 0
    truthful.calls, truthful.stop_at = 0, 6
    assert call(*base, tmp_path / "parts") == 130
    assert read_results(tmp_path / "parts").find(length=400, depth=0.0)["trials"] == 2
    truthful.stop_at = -1
    truthful.calls = 6
    assert call(*base, tmp_path / "parts") == 0
    assert read_results(tmp_path / "parts").rows == read_results(tmp_path / "whole").rows
    assert truthful.calls == 16
    assert call(*base, tmp_path / "parts") == 0
    assert truthful.calls == 16, "nothing was left to ask"
    assert call(*base, tmp_path / "parts", "--depths", 1, "--trials", 5) == 0
    assert truthful.calls == 18, "one more trial at each length"


def test_results_of_another_run_are_not_gone_on_with(folders, truthful, tmp_path, capsys):
    """Another seed, and another model of the same name."""
    base = ("--model", folders("clex"), *GRID, "--output", tmp_path / "out")
    assert call(*base) == 0
    assert call(*base, "--seed", 1) == 2
    assert "seed: 0 there, 1 here" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out.json").read_text())
    for row in rows["rows"]:
        row["model"] = "another"
    (tmp_path / "out.json").write_text(json.dumps(rows))
    assert call(*base) == 2
    assert "another model called clex" in capsys.readouterr().err


def test_several_models_and_policies(folders, truthful, capsys):
    """A table each; a fixed scale is shown as such."""
    models = ("--model", folders("clex"), folders("gene"))
    assert call(*models, "--lengths", 400, "--trials", 1, "--depths", 0.5) == 0
    out = capsys.readouterr().out
    assert "Task passkey, clex" in out
    assert "Task passkey, gene" in out
    fixed = ("--lengths", 400, "--trials", 1, "--depths", 0.5, "--scale", 3.5)
    assert call("--model", folders("clex"), *fixed) == 0
    assert " 3.5 " in capsys.readouterr().out


def test_the_default_lengths_are_those_of_training(folders, truthful, capsys):
    """1, 2 and 4 times; 64 tokens hold no prompt, and the message says what would."""
    assert call("--model", folders("clex"), "--trials", 1) == 2
    assert "A length of 64 is too short for --task passkey" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--lengths", "1025"), "1025 tokens are beyond the reach"),
        (("--lengths", "100"), "too short for --task passkey"),
        (("--lengths", "-5"), "--lengths must be at least 2 tokens, got -5"),
        (("--trials", "0"), "--trials must be at least 1"),
        (("--depths", "1.5"), "--depths must be within 0..1"),
        (("--seed", "-1"), "--seed"),
        (("--scale", "99"), "within 1..16"),
        (("--kv-bits", "7"), "--kv-bits"),
        (("--max-kv-size", "9"), "--max-kv-size"),
        (("--adapter-path", "nowhere"), "adapter_config.json"),
        (("--model", "nowhere/at/all"), "neither a folder"),
        (("--model", "a", "b", "--adapter-path", "c"), "a single --model"),
    ],
)
def test_bad_input_is_one_line(folders, capsys, more, match):
    """Exit 2, before anything is read."""
    assert call("--model", folders("clex"), *more) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert match in err[-1]
    assert "Traceback" not in "".join(err)


def test_every_model_is_looked_for_before_the_first_is_measured(folders, tmp_path, capsys):
    """A name that was mistyped came out when the models before it were done."""
    argv = ("--model", folders("clex"), "nowhere/at/all", "--lengths", 500, "--trials", 1)
    assert call(*argv, "--output", tmp_path / "out") == 2
    assert "neither a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_model_only_the_bundled_task_makes_sense(capsys):
    """The bundled models have never seen the others' sentences."""
    assert call("--task", "kv") == 2
    assert "No model for --task kv" in capsys.readouterr().err


def test_bundled_models_that_are_named_have_their_own_task(truthful, capsys):
    """README's command for the fine-tunes alone was refused: the default task does not fit them."""
    argv = ("--model", "bundled:gene", "--trials", 1, "--depths", 0.5)
    assert call(*argv) == 0
    table = capsys.readouterr().out
    assert "Task words, gene" in table
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        "64",
        "128",
        "256",
        "512",
        "1024",
    ]
