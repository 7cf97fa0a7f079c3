"""Prompts equal the published ones, reuse changes no answer, and counts are right."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_clex import load, make_prompt_cache, passkey
from mlx_clex.evaluation import tasks
from mlx_clex.evaluation.results import read_results
from mlx_clex.passkey import TASKS, Reader

from .conftest import scaled_folders

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
COUNT = 6  # tokens of an answer; longer answers of random models meet near ties


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function from a method's name to a folder; the trained length is 64."""
    return scaled_folders(tmp_path_factory, factor=16)


@pytest.fixture
def tokenizer(folders):
    return load(folders("stock"))[1]


def call(*argv):
    return passkey.main([str(arg) for arg in argv])


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_passkey_prompt_is_that_of_the_paper():
    """The filler is cut by characters, as published; here at depth 0.25 of 200."""
    text, key = tasks.hide_passkey(rng(), 0.25)
    garbage = " ".join([GRASS] * 9)
    assert text(200) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there.\n"
        f"{garbage[:50]}\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        f"{garbage[:150]}\nWhat is the pass key? The pass key is"
    )
    assert 1 <= int(key) <= 50_000


def test_the_number_prompt_is_that_of_infinitebench():
    """The prompt has ten digits, and each sentence group is a line."""
    text, key = tasks.hide_number(rng(), 0.5)
    assert text(4) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz "
        f"you about the important information there.\n\n{GRASS}\n{GRASS}\n"
        f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
        f"{GRASS}\n{GRASS}\n\nWhat is the sequence of digits?\n\nThe sequence of digits is"
    )
    assert re.fullmatch("[0-9]{10}", key)
    assert len(re.findall(r"(\d)\1*", key)) <= 5, "five digits, the others repeat a neighbour"


def test_the_value_prompt_is_that_of_infinitebench():
    """The prompt has a JSON object with the pair at its depth."""
    text, value = tasks.hide_value(rng(), 0.5)
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
    assert text(2).count(value) == 1, "a shorter text must have the same value"


@pytest.mark.parametrize("task", ["passkey", "number", "kv"])
@pytest.mark.parametrize("length", [500, 777, 1300])
def test_a_prompt_has_as_much_filler_as_fits(tokenizer, task, length):
    """Prompts were up to a piece of filler too short."""
    hide = {"passkey": "hide_passkey", "number": "hide_number", "kv": "hide_value"}[task]
    prompt, fact = TASKS[task].draw(rng(length), tokenizer, length, 0.3)
    text, same = getattr(tasks, hide)(rng(length), 0.3)
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
    """The first number must be the fact, or the value must be a word of the answer."""
    assert TASKS[task].found(reply, "123") is found


def plain_answer(folder, prompt):
    """Return greedy decoding with a new cache that is planned for the prompt's length."""
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
        ("clex-log", False),  # the gain depends on the length, and no two lengths are equal
    ],
)
def test_answers_with_and_without_reuse_are_identical(folders, name, shares):
    """Reused prefixes had keys at the scale of another length."""
    folder = folders(name)
    model, tokenizer = load(folder)
    draw = TASKS["passkey"].draw
    prompts = [
        draw(rng((length, trial)), tokenizer, length, depth)[0]
        for length in (450, 500, 700)
        for depth in (1.0, 0.5)
        for trial in (0, 1)
    ]
    # Each of these has another length than the one before, so the scale changes back and forth.
    prompts += prompts[::4]
    reader = Reader(model, tokenizer)
    starts = []
    for prompt in prompts:
        read = []
        fresh = Reader(model, tokenizer).answer(prompt, COUNT)
        assert reader.answer(prompt, COUNT, read.append) == fresh
        starts.append(read[0])
    assert any(starts) is shares, starts
    plain = plain_answer(folder, prompts[-1])
    assert fresh.strip() == plain.strip()


def test_prompts_reuse_the_filler_before_the_fact(folders, tokenizer):
    """After the deepest prompt, all others must reuse the filler before their fact."""
    reader = Reader(load(folders("clex"))[0], tokenizer)
    for trial, depth in enumerate((1.0, 0.8, 0.8, 0.5)):
        prompt = TASKS["passkey"].draw(rng(trial), tokenizer, 500, depth)[0]
        read = []
        reader.answer(prompt, COUNT, read.append)
        if trial:
            assert "is the pass key" not in tokenizer.decode(prompt[: read[0]])
            assert "The pass key is" in tokenizer.decode(prompt[: read[0] + 40])


def test_a_quantised_cache_is_not_reused(folders, tokenizer):
    """It is unknown which keys were quantised when a token was read."""
    model, _ = load(folders("clex"))
    reader = Reader(model, tokenizer, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    prompt = TASKS["passkey"].draw(rng(), tokenizer, 500, 1.0)[0]
    first = reader.answer(prompt, COUNT)
    read = []
    assert reader.answer(prompt, COUNT, read.append) == first
    assert read[0] == 0


class Truthful(Reader):
    """Answer with the fact, except for the prompts in `wrong`."""

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


def test_correct_answers_are_counted(folders, truthful, tmp_path, capsys):
    """Two lengths, two depths and four trials have three wrong answers at known places."""
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


def test_a_quantised_cache_is_quantised_from_the_start(folders, truthful, tmp_path):
    """mlx-lm's start of 5,000 tokens left shorter prompts as they were, under kv_bits: 2."""
    starts = []
    truthful.__post_init__ = lambda self: starts.append(self.quantized_kv_start)
    out = tmp_path / "out"
    assert call("--model", folders("clex"), *GRID, "--kv-bits", 2, "--output", out) == 0
    assert starts == [read_results(out).settings["quantized_kv_start"]] == [0]


def test_an_interrupted_run_continues(folders, truthful, tmp_path, capsys):
    """Each answer must count once, and the rows must equal those of an uninterrupted run."""
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
    assert truthful.calls == 16, "a finished run ran trials again"
    assert call(*base, tmp_path / "parts", "--depths", 1, "--trials", 5) == 0
    assert truthful.calls == 18, "one more trial at each length"


def test_results_of_another_run_are_refused(folders, truthful, tmp_path, capsys):
    """Another seed, or another model of the same name, must be refused."""
    base = ("--model", folders("clex"), *GRID, "--output", tmp_path / "out")
    assert call(*base) == 0
    assert call(*base, "--seed", 1) == 2
    assert "seed: 0 in the file, 1 now" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out.json").read_text())
    for row in rows["rows"]:
        row["model"] = "another"
    (tmp_path / "out.json").write_text(json.dumps(rows))
    assert call(*base) == 2
    assert "another model named clex" in capsys.readouterr().err


def test_each_model_has_a_table(folders, truthful, capsys):
    """The table must show a fixed scale."""
    models = ("--model", folders("clex"), folders("gene"))
    assert call(*models, "--lengths", 400, "--trials", 1, "--depths", 0.5) == 0
    out = capsys.readouterr().out
    assert "Task passkey, clex" in out
    assert "Task passkey, gene" in out
    fixed = ("--lengths", 400, "--trials", 1, "--depths", 0.5, "--scale", 3.5)
    assert call("--model", folders("clex"), *fixed) == 0
    assert " 3.5 " in capsys.readouterr().out


def test_the_shortest_default_length_is_the_trained_length(folders, truthful, capsys):
    """64 tokens are too few for a prompt, and the error must say how many it needs."""
    assert call("--model", folders("clex"), "--trials", 1) == 2
    error = capsys.readouterr().err
    assert "A length of 64 is too short for --task passkey: the prompt needs " in error
    assert " tokens without filler and 10 for the answer. Give longer --lengths." in error


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--lengths", "1025"), "1025 tokens, and this model reaches"),
        (("--lengths", "100"), "too short for --task passkey"),
        (("--lengths", "-5"), "--lengths must be at least 2 tokens, got -5"),
        (("--trials", "0"), "--trials must be at least 1"),
        (("--depths", "1.5"), "--depths must be within 0..1"),
        (("--seed", "-1"), "--seed"),
        (("--scale", "99"), "within 1..16"),
        (("--kv-bits", "7"), "--kv-bits"),
        (("--adapter-path", "nowhere"), "adapter_config.json"),
        (("--model", "nowhere/at/all"), "no folder or file"),
        (("--model", "a", "b", "--adapter-path", "c"), "a single --model"),
    ],
)
def test_bad_input_is_one_line(folders, capsys, more, match):
    """The exit status is 2, and the error comes before any measurement."""
    assert call("--model", folders("clex"), *more) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert match in err[-1]
    assert "Traceback" not in "".join(err)


def test_every_model_is_looked_for_before_the_first_is_measured(folders, tmp_path, capsys):
    """A mistyped name was reported only after the models before it were measured."""
    argv = ("--model", folders("clex"), "nowhere/at/all", "--lengths", 500, "--trials", 1)
    assert call(*argv, "--output", tmp_path / "out") == 2
    assert "no folder or file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_model_is_checked_before_the_first_is_measured(folders, tmp_path, capsys):
    """A length beyond the reach of the second was refused after the first had been measured."""
    argv = ("--model", folders("gene"), folders("clex"), "--lengths", 500, 1025, "--trials", 1)
    assert call(*argv, "--output", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "1025 tokens, and this model reaches" in captured.err
    assert "Task passkey" not in captured.out
    assert not list(tmp_path.iterdir())


def test_other_tasks_than_words_need_a_model(capsys):
    """The bundled models are trained only on the sentences of --task words."""
    assert call("--task", "kv") == 2
    assert "No model for --task kv" in capsys.readouterr().err


def test_the_default_task_of_named_bundled_models_is_words(truthful, capsys):
    """README's command for the fine-tunes was refused because the default task was passkey."""
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
