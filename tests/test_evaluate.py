"""Tasks of lm-evaluation-harness on our models: scores checked by hand, cuts reported."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.evaluate import MLXLM

from mlx_clex import evaluate, load
from mlx_clex.errors import RunError
from mlx_clex.evaluation import harness_tasks
from mlx_clex.evaluation.harness import PlannedLM
from mlx_clex.evaluation.reader import Reader
from mlx_clex.evaluation.results import read_results

from .conftest import scaled_folders
from .tiny_families import tiny

BUILT_IN = Path(lm_eval.__file__).parent / "tasks"

# Warnings of jieba, fuzzywuzzy and other packages of the harness.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
    pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher"),
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function from a method's name to a folder; the trained length is 64."""
    return scaled_folders(tmp_path_factory, factor=40)


class FewWords:
    _categories = {  # noqa: RUF012 - RULER reads it
        "nouns": ["larch", "crate", "hour"],
        "adjectives": ["odd", "permissible"],
        "verbs": [],
    }


DOCUMENT = ("context", "question", "answers")


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Write task files of the three benchmarks with local documents; return their folder."""
    monkeypatch.setattr(harness_tasks.datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    # RULER requires a sentence splitter, which a haystack of repeated sentences never calls.
    (tmp_path / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk_data")])
    # On import RULER combines six million pairs of adjectives and nouns.
    monkeypatch.setattr("wonderwords.RandomWord", FewWords)
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name, include, split, docs):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (folder / f"{name}.yaml").write_text(
            f"include: {BUILT_IN / include}\ntask: {name}\ndataset_path: json\n"
            f"dataset_name: null\ntag: null\ndataset_kwargs:\n  data_files:\n"
            f"    {split}: {folder / name}.jsonl\n"
        )

    for name, line in (("broken_split", "test_split: nowhere"), ("unsafe", "unsafe_code: true")):
        write(name, "longbench/hotpotqa.yaml", "test", [dict.fromkeys(DOCUMENT, "x")])
        with (folder / f"{name}.yaml").open("a") as file:
            file.write(line + "\n")
    write(
        "local_hotpotqa",
        "longbench/hotpotqa.yaml",
        "test",
        [
            {"context": "A barn is red. " * 8, "question": "What is red?", "answers": ["barn"]},
            {"context": "B " * 60, "question": "Which house?", "answers": ["red house", "x"]},
        ],
    )
    write(
        "local_passkey",
        "infinitebench/infinitebench_passkey.yaml",
        "passkey",
        [
            {
                "id": number,
                "context": f"The pass key is {key}. Remember it. {key} is the pass key.",
                "input": "What is the pass key?",
                "answer": [key],
                "options": [],
            }
            for number, key in enumerate(("71432", "90210"))
        ],
    )
    (folder / "local_niah.yaml").write_text(
        f"include: {BUILT_IN / 'ruler/niah_single_1.yaml'}\ntask: local_niah\ntag: null\n"
    )
    (folder / "remote_hotpotqa.yaml").write_text(
        f"include: {BUILT_IN / 'longbench/hotpotqa.yaml'}\ntask: remote_hotpotqa\ntag: null\n"
    )
    return folder


def call(*argv):
    return evaluate.main([str(arg) for arg in argv])


@pytest.fixture
def replies(monkeypatch):
    """Replace the model's answers by `answer(prompt text)`, and record the prompts."""
    told = SimpleNamespace(prompts=[], longest=[], answer=lambda text: "")

    def answer(self, prompt, max_tokens, progress=None, until=()):
        told.prompts.append(prompt)
        told.longest.append(max_tokens)
        return told.answer(self.tokenizer.decode(prompt))

    monkeypatch.setattr(Reader, "answer", answer)
    return told


def value(results, task, metric):
    return results.find(task=task, metric=metric)["value"]


def test_longbench_scores(folders, local, replies, tmp_path, capsys):
    """F1 ignores articles: 1 for "The barn.", 1/2 for "red barn" against "red house"."""
    replies.answer = lambda text: "The barn." if "What is red?" in text else "red barn"
    out = tmp_path / "out"
    tasks = ("--tasks", "local_hotpotqa", "--include-path", local)
    assert call("--model", folders("gene"), *tasks, "--output", out) == 0
    row = read_results(out, "evaluate").find(task="local_hotpotqa", metric="qa_f1_score")
    assert row["value"] == 0.75
    assert (row["label"], row["samples"], row["length"]) == ("gene", 2, None)
    assert abs(row["stderr"] - 0.25) < 1e-9
    assert "local_hotpotqa" in capsys.readouterr().out
    assert (tmp_path / "out.csv").is_file()


def test_infinitebench_scores(folders, local, replies, tmp_path):
    """The first number of the answer counts."""
    replies.answer = lambda text: " 71432\n90210"
    out = tmp_path / "out"
    tasks = ("--tasks", "local_passkey", "--include-path", local)
    assert call("--model", folders("gene"), *tasks, "--output", out) == 0
    assert value(read_results(out), "local_passkey", "score") == 0.5


def test_a_killed_run_reuses_its_answers(folders, local, tmp_path, monkeypatch):
    """After a SIGKILL in a task, the scores must equal those of an uninterrupted run."""
    documents = [
        {"context": f"Barn {n} is red. " * 40, "question": "What is red?", "answers": [f"barn {n}"]}
        for n in range(30)
    ]
    lines = [json.dumps(document) + "\n" for document in documents]
    (local / "local_hotpotqa.jsonl").write_text("".join(lines))
    argv = ("--model", str(folders("gene")), "--tasks", "local_hotpotqa", "local_passkey")
    argv += ("--include-path", str(local), "--output")
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    command = [sys.executable, "-m", "mlx_clex.evaluate", *argv, str(tmp_path / "killed")]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while kept_answers(tmp_path) == 0:
        assert run.poll() is None, "the run ended before it could be killed"
    run.kill()
    run.wait()
    kept = kept_answers(tmp_path)
    assert not read_results(tmp_path / "killed").rows

    asked = []
    real = Reader.answer
    monkeypatch.setattr(
        Reader, "answer", lambda *args, **kwargs: asked.append(1) or real(*args, **kwargs)
    )
    assert call(*argv, tmp_path / "killed") == 0
    assert 0 < kept < 30
    assert len(asked) == 32 - kept
    assert call(*argv, tmp_path / "killed") == 0
    assert len(asked) == 32 - kept, "a finished run generated answers again"
    assert call(*argv, tmp_path / "whole") == 0
    assert read_results(tmp_path / "killed").rows == read_results(tmp_path / "whole").rows


def kept_answers(folder):
    """Return the number of answers in the harness's file, which another process writes."""
    for file in folder.glob("killed.answers*.db"):
        with (
            contextlib.closing(sqlite3.connect(file, timeout=60)) as base,
            contextlib.suppress(sqlite3.OperationalError),  # no table yet
        ):
            return base.execute("SELECT count(*) FROM unnamed").fetchone()[0]
    return 0


LENGTHS = '{"max_seq_lengths": [600, 1000]}'


def test_ruler_scores_by_length(folders, local, replies, tmp_path, capsys):
    """--metadata must reach the task, and --limit must apply to each length."""

    def answer(text):
        key = re.search(r"special magic number for (\S+) mentioned in", text)[1]
        number = re.search(rf"numbers for {key} is: (\d+)", text)[1]
        return number if len(replies.prompts) < 4 else "none"

    replies.answer = answer
    base = ("--model", folders("gene"), "--include-path", local, "--output", tmp_path / "out")
    ruler = ("--tasks", "local_niah", "--metadata", LENGTHS, "--limit", 2)
    assert call(*base, *ruler, "--effective-length") == 0
    assert len(replies.prompts) == 4
    sizes = sorted(len(prompt) for prompt in replies.prompts)
    assert sizes[1] <= 600 < sizes[2] <= 1000
    results = read_results(tmp_path / "out")
    short, long = (results.find(task="local_niah", length=length) for length in (600, 1000))
    assert (short["value"], short["samples"]) == (1.0, 2)
    assert (long["value"], long["samples"]) == (0.5, 2)
    out = capsys.readouterr().out
    assert "gene: 600: 100.0%, 1000: 50.0%" in out
    assert "Effective context length: 600 tokens (above 85.6%" in out
    assert "1 of RULER's 13 tasks" in out
    # The same report from the stored results.
    assert call("--effective-length", "--output", tmp_path / "out") == 0
    assert "Effective context length: 600 tokens" in capsys.readouterr().out


def test_the_effective_length_ends_at_the_first_low_score():
    """A longer length with a high score does not count."""
    rows = [
        {"label": "m", "task": task, "length": length, "value": score}
        for length, scores in {4096: (1.0, 0.9), 8192: (1.0, 0.6), 16384: (1.0, 1.0)}.items()
        for task, score in zip("ab", scores, strict=True)
    ]
    results = SimpleNamespace(rows=rows)
    means, effective = evaluate.effective_length(results, "m")
    assert list(means.values()) == [0.95, 0.8, 1.0]
    assert effective == 4096
    assert evaluate.effective_length(SimpleNamespace(rows=rows[2:]), "m")[1] is None


def test_the_effective_length_uses_the_same_tasks_at_each_length():
    """A length at which only the easiest task was run had the best mean."""
    scores = {"a": {4096: 0.9, 8192: 0.5}, "b": {4096: 0.9}, "c": {8192: 1.0}}
    rows = [
        {"label": "m", "task": task, "length": length, "value": score}
        for task, by_length in scores.items()
        for length, score in by_length.items()
    ]
    results = SimpleNamespace(rows=rows)
    assert evaluate.effective_length(results, "m") == ({4096: 0.9, 8192: 0.5}, 4096)
    results.rows = [row for row in rows if row["task"] != "a"]
    assert evaluate.effective_length(results, "m") == ({}, None)


def test_a_model_is_scored_end_to_end(folders, local, tmp_path):
    """Real answers of the model give scores between 0 and 1."""
    out = tmp_path / "out"
    argv = ("--tasks", "local_passkey", "local_hotpotqa", "--include-path", local, "--limit", 1)
    assert call("--model", folders("clex"), *argv, "--output", out) == 0
    results = read_results(out)
    assert {row["task"] for row in results.rows} == {"local_passkey", "local_hotpotqa"}
    assert all(row["samples"] == 1 and 0 <= row["value"] <= 1 for row in results.rows)


def test_a_prompt_that_is_too_long_loses_its_middle(folders, local, replies, tmp_path, capsys):
    """LongBench has instructions at both ends of a prompt; the harness cut off the first."""
    model = folders("gene")
    argv = ("--model", model, "--tasks", "local_hotpotqa", "--include-path", local)
    assert call(*argv) == 0
    whole, replies.prompts = replies.prompts, []
    assert "lost" not in capsys.readouterr().err
    # Exactly the shorter prompt and its answer of 32 tokens fit.
    sizes = sorted(map(len, whole))
    assert sizes[0] < sizes[1]
    assert call(*argv, "--max-length", sizes[0] + 32) == 0
    half = sizes[0] // 2
    expected = [p if len(p) == sizes[0] else p[:half] + p[-half:] for p in whole]
    assert replies.prompts == expected
    assert "1 of 2 new prompts were longer than" in capsys.readouterr().err


def test_the_default_max_length_is_a_hard_reach(folders, local, replies, tmp_path):
    """The tiny CLEX model reaches 40 times 64 tokens."""
    file = local / "local_hotpotqa.jsonl"
    docs = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(json.dumps({**docs[0], "context": "A barn is red. " * 900}) + "\n")
    argv = ("--model", folders("clex"), "--tasks", "local_hotpotqa", "--include-path", local)
    assert call(*argv) == 0
    assert [len(prompt) for prompt in replies.prompts] == [40 * 64 - 32]


def test_answers_of_another_model_of_that_name_are_not_reused(folders, local, replies, tmp_path):
    """After the results were deleted, a retrained model got the answers of the old one."""
    argv = ("--tasks", "local_hotpotqa", "--include-path", local, "--output", tmp_path / "out")
    for name, asked in (("gene", 2), ("clex", 4)):
        model = tmp_path / name / "model"
        shutil.copytree(folders(name), model)
        assert call("--model", model, *argv) == 0
        assert len(replies.prompts) == asked
        (tmp_path / "out.json").unlink()


def test_the_length_of_an_answer_may_have_any_of_the_harness_names(
    folders, local, replies, tmp_path
):
    """max_new_tokens and its like were ignored, and 256 tokens were generated."""
    file = local / "local_passkey.yaml"
    plain = file.read_text()
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        file.write_text(plain + f"generation_kwargs:\n  {name}: 3\n  until: x\n")
        argv = ("--model", folders("gene"), "--tasks", "local_passkey", "--include-path", local)
        assert call(*argv) == 0
        assert replies.longest[-1] == 3


def test_a_task_that_allows_no_examples_gets_a_message(folders, local, replies, capsys):
    """--num-shots had no effect on it, and was recorded as if it had."""
    file = local / "local_passkey.yaml"
    file.write_text(file.read_text() + "num_fewshot: 0\n")
    argv = ("--model", folders("gene"), "--tasks", "local_passkey", "--include-path", local)
    assert call(*argv, "--num-shots", 2) == 0
    assert "--num-shots 2 has no effect on it" in capsys.readouterr().err


def test_a_score_that_is_no_number_is_left_out(folders, local, replies, tmp_path, capsys):
    """A correlation of equal answers is NaN; the run ended and blamed the model's weights."""
    (local / "utils.py").write_text(
        "def scores(doc, results):\n    return {'a': float('nan'), 'b': 1.0}\n"
    )
    with (local / "local_passkey.yaml").open("a") as file:
        metrics = ", ".join(f"{{metric: {name}, aggregation: mean}}" for name in "ab")
        file.write(f"process_results: !function utils.scores\nmetric_list: [{metrics}]\n")
    argv = ("--model", folders("gene"), "--tasks", "local_passkey", "--include-path", local)
    assert call(*argv, "--output", tmp_path / "out") == 0
    assert [row["metric"] for row in read_results(tmp_path / "out").rows] == ["b"]
    assert "local_passkey: a is nan and is left out" in capsys.readouterr().err


def test_examples_are_in_one_message(folders, local, monkeypatch):
    """lm-eval's default makes a turn of each, and mlx-lm's evaluate does not."""
    asked = []
    monkeypatch.setattr(
        lm_eval, "simple_evaluate", lambda **options: asked.append(options) or {"results": {}}
    )
    argv = ("--tasks", "local_hotpotqa", "--include-path", local, "--num-shots", 1)
    assert call("--model", folders("gene"), *argv) == 0
    assert asked[0]["fewshot_as_multiturn"] is False


def test_choices_behind_a_window_are_scored_alone():
    """The keys that a choice pushes out of a window were missing for the next choice."""
    model = tiny("gemma3_text", sliding_window=32)
    mine = PlannedLM(model, SimpleNamespace(bos_token_id=1, eos_token_id=2, has_thinking=False))
    context = list(range(3, 31))
    ends = [[40, 41, 42, 43, 44, 45], [50, 51, 52, 53], [60, 61, 62]]
    pairs = [(("a context", str(end)), context, end) for end in ends]
    found = mine._loglikelihood_tokens(pairs, disable_tqdm=True)
    for (score, _), end in zip(found, ends, strict=True):
        assert abs(score - plain(model, context + end, len(end))[0]) < 1e-3


def test_a_task_with_sampling_gets_a_message(folders, local, replies, capsys):
    """A task that asks for sampling got greedy answers without a message."""
    file = local / "local_passkey.yaml"
    file.write_text(file.read_text() + "generation_kwargs:\n  do_sample: true\n  until: []\n")
    argv = ("--model", folders("gene"), "--tasks", "local_passkey", "--include-path", local)
    assert call(*argv) == 0
    assert "local_passkey asks for sampling; answers are greedy" in capsys.readouterr().err


def test_a_failure_of_mlx_is_one_line(folders, monkeypatch):
    """A failure such as running out of memory was a traceback."""

    def fail(self, inputs, cache=None, step_size=2048):
        raise RuntimeError("[metal::malloc] Attempting to allocate too much")

    monkeypatch.setattr(PlannedLM, "_score_fn", fail)
    with pytest.raises(RunError, match="MLX failed after 0 tokens"):
        lm(folders("gene")).loglikelihood([request(TEXT, " A dog.")], disable_tqdm=True)


def request(*args):
    return SimpleNamespace(args=args)


def lm(folder, **options):
    model, tokenizer = load(folder)
    return PlannedLM(model, tokenizer, **options)


def plain(model, tokens, count):
    """Return (log-likelihood, is greedy) of the last `count` tokens from one pass."""
    logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
    scores = nn.log_softmax(logits)[-count:]
    ends = mx.array(tokens[-count:])
    picked = mx.take_along_axis(scores, ends[:, None], axis=-1)
    return picked.sum().item(), (scores.argmax(-1) == ends).all().item()


TEXT = "The quick brown fox runs away from the lazy dog. "


@pytest.mark.parametrize("name", ["clex", "clex-log", "gene", "dynamic", "yarn", "stock"])
def test_loglikelihoods_equal_those_of_one_pass(folders, name):
    """mlx-lm's harness reads in chunks, each at the scale of the length read so far."""
    mine = lm(folders(name))
    # Some contexts have continuations on both sides of a step of the scale.
    contexts = [TEXT * count for count in (1, 2, 3, 5, 8)]
    ends = [" dog", " A dog sits.", " " + TEXT, " fox" * 20]
    requests = [request(context, end) for context in contexts for end in ends]
    requests += [request("", TEXT), request(TEXT + " ", "dog")]
    # This continuation is greedy by construction.
    tokens = mine.tok_encode(TEXT)
    likeliest = mine._model(mx.array([tokens]))[0, -1].argmax().item()
    got = mine._loglikelihood_tokens([(None, tokens, [likeliest])], disable_tqdm=True)
    assert got[0][1]
    found = mine.loglikelihood(requests, disable_tqdm=True)
    for (context, end), (score, greedy) in zip((r.args for r in requests), found, strict=True):
        whole = mine.tok_encode(context + end)
        count = len(whole) - (len(mine.tok_encode(context.rstrip())) if context else 1)
        expected, is_greedy = plain(mine._model, whole, count)
        assert abs(score - expected) < 2e-3 + 1e-5 * abs(expected), (len(whole), count)
        assert greedy == is_greedy


def test_whole_texts_are_scored_in_one_window(folders):
    """With `max_length` the windows are disjoint, and each token counts once."""
    mine = lm(folders("clex"))
    tokens = mine.tok_encode(TEXT * 6)
    assert tokens[0] == mine.prefix_token_id
    (score,) = mine.loglikelihood_rolling([request(TEXT * 6)], disable_tqdm=True)
    assert abs(score - plain(mine._model, tokens, len(tokens) - 1)[0]) < 2e-3

    short = lm(folders("clex"), max_length=100)
    (score,) = short.loglikelihood_rolling([request(TEXT * 6)], disable_tqdm=True)
    expected, rest = plain(mine._model, tokens[:101], 100)[0], tokens[1:]
    for start in range(100, len(rest), 100):
        end = min(start + 100, len(rest))
        # The last window has more context.
        window = rest[end - 101 : end]
        expected += plain(mine._model, window, end - start)[0]
    assert abs(score - expected) < 5e-3


def test_an_empty_text_has_no_loss(folders):
    """An assertion of lm-eval ended the whole run."""
    mine = lm(folders("clex"))
    assert mine.loglikelihood_rolling([request(""), request("A cat.")], disable_tqdm=True)[0] == 0


def test_a_text_has_one_bos_token(folders):
    """The prefix token or the template stood before the BOS token of the text."""
    ours = lm(folders("clex"))
    bos = ours.tokenizer.bos_token
    plain, begins = ours.loglikelihood_rolling([request("A cat."), request(bos + "A cat.")])
    assert plain == begins
    pairs = [request(begin + "A cat", " sat.") for begin in ("", bos)]
    assert len(set(ours.loglikelihood(pairs, disable_tqdm=True))) == 1

    ours.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    rendered = {
        ours.apply_chat_template([{"role": "user", "content": begin + "A cat."}])
        for begin in ("", bos)
    }
    assert rendered == {bos + "A cat."}


def test_long_contexts_are_not_cut(folders, monkeypatch):
    """mlx-lm's harness silently drops the start of contexts above 8,192 tokens."""
    read = []

    def score_ends(self, context, ends):
        read.append(len(context))
        return [(0.0, False)] * len(ends)

    monkeypatch.setattr(PlannedLM, "_score_ends", score_ends)
    mine = lm(folders("gene"))
    text = TEXT * 500
    assert len(mine.tok_encode(text.rstrip())) > 8192 + 100
    mine.loglikelihood([request(text, "dog")], disable_tqdm=True)
    assert read == [len(mine.tok_encode(text.rstrip()))]


def test_answers_end_before_the_stop_text(folders):
    """Answers must equal those of `Reader`, without the stop text."""
    mine = lm(folders("clex"))
    options = {"max_gen_toks": 12, "until": ["\n\n"]}
    (whole,) = mine.generate_until([request(TEXT * 4, options)], disable_tqdm=True)
    expected = Reader(mine._model, mine.tokenizer).answer(mine.tok_encode(TEXT * 4), 12)
    assert whole == expected.split("\n\n")[0]
    assert len(whole) > 3
    stop = whole[2:4]
    options = {"max_gen_toks": 12, "until": stop}
    (cut,) = mine.generate_until([request(TEXT * 4, options)], disable_tqdm=True)
    assert cut == whole.split(stop)[0]


def test_it_is_the_harness_class_of_mlx_lm(folders):
    """Chat templates and names come from mlx-lm's class."""
    mine = lm(folders("stock"), use_chat_template=True)
    assert isinstance(mine, MLXLM)
    template = "{% for m in messages %}<{{ m['content'] }}{{ mood }}>{% endfor %}"
    mine.tokenizer.chat_template = template
    assert mine.apply_chat_template([{"role": "user", "content": "A"}]) == "<A>"
    told = lm(folders("stock"), use_chat_template=True, chat_template_args={"mood": "!"})
    told.tokenizer.chat_template = template
    assert told.apply_chat_template([{"role": "user", "content": "A"}]) == "<A!>"
    assert mine.tok_encode("A") == mine.tokenizer.encode("A", add_special_tokens=False)


class Few(harness_tasks.TaskManager):
    """A task manager without the harness's 14,000 task files, which take long to index."""

    def __init__(self, include_path=None, include_defaults=False, metadata=None):
        super().__init__(include_path=include_path, include_defaults=False, metadata=metadata)


def test_broken_files_are_named(folders, local, monkeypatch, capsys):
    """A broken local file was reported as a dataset missing on the hub, or an unknown task."""
    monkeypatch.setattr(harness_tasks, "TaskManager", Few)
    base = ("--model", folders("clex"), "--include-path", local, "--tasks")
    with (local / "local_hotpotqa.jsonl").open("a") as file:
        file.write('{"context": \n')
    assert call(*base, "local_hotpotqa") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "local_hotpotqa.jsonl" in error
    assert "cannot be read" in error
    (local / "mine.yaml").write_text("task: [\n")
    assert call(*base, "mine") == 2
    assert "mine.yaml is not valid YAML" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--tasks", "local_hotpot"), ["no task 'local_hotpot'", "local_hotpotqa"]),
        (("--tasks", "xyz"), ["no task 'xyz'", "--include-path"]),
        (("--tasks", "remote_hotpotqa"), ["Xnhyacinth/LongBench", "datasets", "hotpotqa"]),
        (("--metadata", "{"), ["--metadata is not JSON"]),
        (("--metadata", "[1]"), ["--metadata must be a JSON object"]),
        (("--limit", "0"), ["--limit must be at least 1"]),
        (("--scale", "grow"), ["--scale grow"]),
        (("--scale", "99"), ["within 1..40"]),
        (("--max-length", "9999"), ["reaches 2560"]),
        (("--max-length", "20"), ["--max-length 20 leaves no room"]),
        (("--apply-chat-template",), ["no chat template"]),
        (("--include-path", "/nowhere"), ["--include-path /nowhere is not a folder"]),
        (("--adapter-path", "/nowhere"), ["adapter_config.json"]),
        (("--model", "/nowhere"), ["no folder or file"]),
        (("--effective-length",), ["--effective-length needs a task of RULER", "local_hotpotqa"]),
        (("--chat-template-args", "{"), ["--chat-template-args is not JSON"]),
        (
            ("--tasks", "local_niah", "--metadata", '{"max_seq_lengths": [600, 3000]}'),
            ["documents of 3000", "is 2560"],
        ),
        # Without --metadata RULER's documents have 4,096 tokens.
        (("--tasks", "local_niah"), ["documents of 4096", "is 2560"]),
        (("--tasks", "broken_split"), ["broken_split does not load: it lacks 'nowhere'"]),
        (("--tasks", "unsafe"), ["unsafe", "--confirm-run-unsafe-code"]),
    ],
)
def test_bad_input_is_one_line(folders, local, replies, monkeypatch, capsys, more, words):
    """The exit status is 2, and the error names what is missing."""
    monkeypatch.setattr(harness_tasks, "TaskManager", Few)
    base = ("--model", folders("clex"), "--tasks", "local_hotpotqa", "--include-path", local)
    assert call(*base, *more) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("mlx_clex evaluate: error: "), err
    assert all(word in err[-1] for word in words), err[-1]
    assert "Traceback" not in "".join(err)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ((), "No task"),
        (("--effective-length",), "No task"),
        (("--tasks", "ruler"), "No model"),
        (("--effective-length", "--output", "/nowhere/x"), "cannot be read"),
    ],
)
def test_missing_options_are_one_line(capsys, argv, match):
    """The error must say what is missing."""
    assert call(*argv) == 2
    assert match in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    """The error must have the command that installs lm-eval."""
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert call("--model", "a", "--tasks", "ruler") == 2
    assert "pip install 'mlx-clex[evaluate]'" in capsys.readouterr().err


def test_a_tokenizer_with_its_own_code_is_not_passed_on(folders, local, capsys, tmp_path):
    """RULER ran the tokenizer's code without --trust-remote-code."""
    folder = tmp_path / "code"
    folder.mkdir()
    for file in folders("gene").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    argv = ("--tasks", "local_niah", "--include-path", local, "--metadata", LENGTHS)
    assert call("--model", folder, *argv) == 2
    assert "No tokenizer" in capsys.readouterr().err.strip().splitlines()[-1]
