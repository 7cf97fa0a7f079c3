"""Texts become tokens on disk, and tokens become batches."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from sentencepiece import SentencePieceProcessor

from mlx_clex.checkpoint.released_templates import GENE
from mlx_clex.data.corpus import Corpus, find_files, load_corpora
from mlx_clex.errors import InputError
from mlx_clex.training.batches import Batches

from ..conftest import GOLDEN


class Letters:
    """A tokenizer with one token for each letter and a chat template with turn tokens 3 and 4."""

    eos_token_id = 0
    bos_token, bos_token_id = "<s>", 1
    chat_template = "turns"
    has_chat_template = True

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def encode(self, text, add_special_tokens=True, verbose=True):
        return ([1] if add_special_tokens else []) + [ord(c) for c in text]

    def apply_chat_template(
        self, messages, tools=None, add_generation_prompt=False, return_dict=False
    ):
        ids = [2]
        for message in messages:
            ids += [3, *(ord(c) for c in message["content"]), 4]
        return ids + ([3] if add_generation_prompt else [])


def load_from(folder, cache, mask_prompt=False, splits=("train", "valid")):
    return load_corpora(
        folder, Letters(), mask_prompt=mask_prompt, cache_dir=cache / "cache", splits=splits
    )


def corpus_of(*texts, prompts=None):
    starts = np.cumsum([0, *(len(text) for text in texts[:-1])])
    prompts = np.array(prompts or [0] * len(texts))
    return Corpus("texts", np.concatenate(texts).astype(np.uint32), starts, prompts)


def write_jsonl(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("record", "ids", "prompt"),
    [
        ({"text": "ab"}, [1, 97, 98, 0], 0),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [2, 3, 97, 4, 3, 98, 4],
            5,
        ),
        ({"prompt": "a", "completion": "b"}, [2, 3, 97, 4, 3, 98, 4], 5),
    ],
)
def test_formats_of_mlx_lm_are_read(tmp_path, record, ids, prompt):
    """mlx-lm's own code reads text, chat and completions."""
    write_jsonl(tmp_path / "train.jsonl", record, record)
    corpus = load_from(tmp_path, tmp_path, mask_prompt=prompt > 0)["train"]
    assert corpus.tokens.tolist() == ids * 2
    assert corpus.starts.tolist() == [0, len(ids)]
    assert corpus.prompts.tolist() == [prompt] * 2
    assert isinstance(corpus.tokens, np.memmap)


@pytest.mark.parametrize(
    ("record", "features"),
    [
        ({"body": "ab"}, {"text_feature": "body"}),
        ({"q": "a", "a": "b"}, {"prompt_feature": "q", "completion_feature": "a"}),
        ({"chat": [{"role": "user", "content": "ab"}]}, {"chat_feature": "chat"}),
    ],
)
def test_columns_of_other_names(hub, tmp_path, record, features):
    """mlx-lm's settings for a folder and for a data set of the hub; they were refused."""
    write_jsonl(tmp_path / "train.jsonl", record)
    hub["owner/name"] = {"train": Table([record], "1")}
    options = {"mask_prompt": False, "cache_dir": tmp_path / "cache", "splits": ["train"]}
    for source in (tmp_path, Path("owner/name")):
        corpus = load_corpora(source, Letters(), **options, features=features)["train"]
        assert {97, 98} <= set(corpus.tokens.tolist())
        with pytest.raises(InputError, match="cannot be used"):
            load_corpora(source, Letters(), **options)


def test_a_test_part_alone_may_have_its_prompts_masked(tmp_path):
    """It was refused as plain texts, which have no prompts."""
    write_jsonl(tmp_path / "test.jsonl", {"prompt": "a", "completion": "b"})
    corpus = load_from(tmp_path, tmp_path, mask_prompt=True, splits=["test"])["test"]
    assert corpus.prompts.tolist() == [5]


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_turns_of_gene_are_tokenised_piece_by_piece(converted, tmp_path, mask_prompt):
    """One rendered text has other tokens than GeNE's data where pieces meet."""
    tokenizer = load_tokenizer(converted("gene_llama"), {"chat_template": GENE})
    turns = [("brown fox", " jumps over"), ("Lazy? ", "dog, and runs")]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    write_jsonl(tmp_path / "train.jsonl", {"messages": messages})
    pieces = SentencePieceProcessor(str(GOLDEN / "gene_llama" / "tokenizer.model")).encode
    by_hand = [1]
    for question, answer in turns:
        by_hand += pieces("user: ") + pieces(question) + pieces("\n\nassistant: ")
        prompt = len(by_hand)
        by_hand += [*pieces(answer), 2]

    options = {"cache_dir": tmp_path / "cache", "splits": ["train"]}
    corpus = load_corpora(tmp_path, tokenizer, mask_prompt=mask_prompt, **options)["train"]
    assert corpus.tokens.tolist() == by_hand
    assert corpus.tokens.tolist() != tokenizer.apply_chat_template(messages, return_dict=False)
    assert corpus.prompts.tolist() == [prompt if mask_prompt else 0]


def test_the_last_twentieth_of_a_folder_of_texts_is_held_out(tmp_path):
    """Texts in sub-folders are read, other files are not."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b" / "c.md").write_text("y" * 100)
    (tmp_path / "d.csv").write_text("z")
    corpora = load_from(tmp_path, tmp_path)
    both = corpora["train"].tokens.tolist() + corpora["valid"].tokens.tolist()
    assert both == [1] + [ord("x")] * 100 + [0] + [1] + [ord("y")] * 100 + [0]
    assert len(corpora["valid"].tokens) == 11
    assert corpora["valid"].starts.tolist() == [0]
    alone = load_from(tmp_path, tmp_path, splits=["valid"])  # what `perplexity --split valid` asks
    assert list(alone) == ["valid"]
    assert alone["valid"].tokens.tolist() == corpora["valid"].tokens.tolist()
    whole = load_from(tmp_path, tmp_path, splits=["train"])["train"]
    assert whole.tokens.tolist() == both


def test_long_texts_cause_no_warning(converted, tmp_path, caplog):
    """transformers warned that a book is longer than the model's maximum; training cuts it."""
    tokenizer = load_tokenizer(converted("gene_llama"))
    (tmp_path / "a.txt").write_text("a long text " * 200)
    options = {"mask_prompt": False, "cache_dir": tmp_path, "splits": ["train"]}
    caplog.clear()
    assert len(load_corpora(tmp_path, tokenizer, **options)["train"].tokens) > 512
    assert caplog.text == ""


def test_folders_named_train_valid_and_test_are_splits(tmp_path):
    """Each sub-folder's texts belong to its split."""
    for split in ("train", "valid", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(split)
    assert [len(files) for files in find_files(tmp_path).values()] == [1, 1, 1]
    assert len(load_from(tmp_path, tmp_path)["train"].tokens) == 7


def test_a_long_text_is_tokenised_in_pieces(tmp_path, monkeypatch):
    """Pieces end at line ends, and only the first has a beginning-of-text token."""
    monkeypatch.setattr("mlx_clex.data.corpus._PIECE", 10)
    text = "a line\n" * 20
    (tmp_path / "a.txt").write_text(text)
    corpus = load_from(tmp_path, tmp_path, splits=("train",))["train"]
    assert corpus.tokens.tolist() == [1, *(ord(c) for c in text), 0]
    assert corpus.starts.tolist() == [0]


def test_tokens_are_kept_until_something_changes(tmp_path, monkeypatch):
    """A second run must read no text; a run after a change of the file must."""
    file = tmp_path / "a.txt"
    file.write_text("first text")
    load_from(tmp_path, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Letters, "encode", None)
        assert len(load_from(tmp_path, tmp_path)["train"].tokens) == 11
    file.write_text("another, longer text")
    assert len(load_from(tmp_path, tmp_path)["train"].tokens) > 11
    made = sorted(path.name for path in (tmp_path / "cache" / "tokens").iterdir())
    assert len(made) == 2
    assert not any("incomplete" in name for name in made)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'{"text": "a"}\n\n["b"]\n', "line 3 is not a JSON object"),
        (b'{"text": "a"}\n{"words": "a"}\n', "line 2 cannot be used; its keys: words"),
        (b'{"words": "a"}\n', "line 1 cannot be used"),
        (b'{"text": "\xff"}\n', "line 1 is not JSON"),
        (b'{"text": null}\n', "line 1 cannot be used"),
        (b"\n", "has no text"),
    ],
)
def test_broken_lines_are_named(tmp_path, lines, match):
    """The error must name file and line, and no partial token file may stay."""
    (tmp_path / "train.jsonl").write_bytes(lines)
    with pytest.raises(InputError, match=match):
        load_from(tmp_path, tmp_path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_chat_needs_a_chat_template(tmp_path, monkeypatch):
    """The line was blamed, and the keys that it had were those that are allowed."""
    monkeypatch.setattr(Letters, "has_chat_template", False)
    write_jsonl(tmp_path / "train.jsonl", {"text": "a"}, {"messages": [{"role": "user"}]})
    with pytest.raises(InputError, match="line 2 is of a chat, and this model has no chat temp"):
        load_from(tmp_path, tmp_path)


def test_files_that_are_not_read_are_named(tmp_path, capsys):
    """A file of the user's data was left out, and no line said so."""
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "chat.jsonl", "B.TXT", ".hidden"):
        (tmp_path / "texts" / name).write_text('{"text": "words of a text"}')
    load_from(tmp_path / "texts", tmp_path)
    assert f"Not read in {tmp_path / 'texts'}: B.TXT, chat.jsonl." in capsys.readouterr().err
    write_jsonl(tmp_path / "texts" / "train.jsonl", {"text": "a"})
    load_from(tmp_path / "texts", tmp_path)
    assert ": B.TXT, a.txt, chat.jsonl." in capsys.readouterr().err


def test_missing_and_empty_data_are_refused(tmp_path):
    """The error must say what is allowed."""
    with pytest.raises(InputError, match="neither a folder"):
        load_from(tmp_path / "nowhere", tmp_path)
    with pytest.raises(InputError, match=r"train\.jsonl"):
        load_from(tmp_path, tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        load_from(tmp_path, tmp_path)


class Table(list):
    """A list with a fingerprint, in place of a table of `datasets`."""

    def __init__(self, rows, fingerprint):
        super().__init__(rows)
        self._fingerprint = fingerprint


@pytest.fixture
def hub(monkeypatch):
    """Replace the package `datasets`; return the dict of its tables."""
    tables = {}

    class NotFoundError(Exception):
        pass

    def load_dataset(name, split=None, **config):
        if name not in tables:
            raise NotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return tables[name] if split is None else tables[name][split]

    package = ModuleType("datasets")
    package.load_dataset = load_dataset
    package.exceptions = SimpleNamespace(DatasetNotFoundError=NotFoundError)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return tables


def test_a_dataset_of_the_hub_is_tokenised_once(hub, tmp_path, monkeypatch):
    """OWNER/NAME is read as in mlx-lm, cached on disk, and read again after a change."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "ab"}, {"text": "c"}]
    hub["owner/name"] = {"train": Table(rows, "1"), "valid": Table(rows[1:], "2"), "more": []}
    with monkeypatch.context() as patched:
        for _ in range(2):
            corpora = load_from(Path("owner/name"), tmp_path)
            assert corpora["train"].tokens.tolist() == [1, 97, 98, 0, 1, 99, 0]
            assert corpora["train"].starts.tolist() == [0, 4]
            assert corpora["valid"].tokens.tolist() == [1, 99, 0]
            assert corpora["train"].name == "owner/name (train)"
            patched.setattr(Letters, "encode", None)  # the second run must not tokenise
    hub["owner/name"]["train"] = Table(rows[:1], "3")
    assert len(load_from(Path("owner/name"), tmp_path)["train"].tokens) == 4


def test_datasets_of_a_yaml_file_are_joined(hub, tmp_path):
    """Each entry of mlx-lm's hf_dataset may have its own splits and columns."""
    hub["a/b"] = {
        "train[:1]": Table([{"body": "a"}], "1"),
        "train[1:]": Table([{"body": "b"}], "2"),
    }
    chat = [{"messages": [{"role": "user", "content": "c"}]}]
    hub["c"] = {"train[:80%]": Table(chat, "3"), "train[-10%:]": Table(chat, "4")}
    first = {
        "path": "a/b",
        "train_split": "train[:1]",
        "valid_split": "train[1:]",
        "text_feature": "body",
    }
    options = {"mask_prompt": False, "cache_dir": tmp_path}

    def load(entries, splits=("train", "valid")):
        return load_corpora(Path(), Letters(), **options, splits=splits, hf_dataset=entries)

    assert load(first)["valid"].tokens.tolist() == [1, 98, 0]
    both = load([first, {"path": "c"}])
    assert both["train"].tokens.tolist() == [1, 97, 0, 2, 3, 99, 4]
    assert both["train"].name == "a/b + c (train)"
    for entries, splits, match in [
        ([{"name": "a/b"}], ["train"], "path: NAME"),
        ([], ["train"], "path: NAME"),
        (first, ["test"], "key test_split for a/b"),
        ({"path": "a/c"}, ["train"], "a/c cannot be used. .*doesn't exist"),
        (first | {"text_feature": "text"}, ["train"], "a/b cannot be used. .*Unsupported"),
    ]:
        with pytest.raises(InputError, match=match):
            load(entries, splits)


def test_an_unusable_dataset_of_the_hub_is_refused(hub, tmp_path, monkeypatch):
    """A missing package, a wrong name and a bad row must each end in one line."""
    hub["owner/name"] = {"train": Table([{"text": "ab"}, {"text": None}], "1")}
    with pytest.raises(InputError, match=r"owner/name, row 1, cannot be used: "):
        load_from(Path("owner/name"), tmp_path)
    with pytest.raises(
        InputError, match=r"no folder owner/none here, and .*: Not found Hugging Face"
    ):
        load_from(Path("owner/none"), tmp_path)
    with pytest.raises(InputError, match=r"owner/name cannot be used. .*masking"):
        load_from(Path("owner/name"), tmp_path, mask_prompt=True)
    for name in ("a/b.txt", "../name", "a/b/c", "name"):
        with pytest.raises(InputError, match="neither a folder"):
            load_from(Path(name), tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        load_from(Path("owner/name"), tmp_path)


def test_the_real_package_datasets_works(tmp_path, monkeypatch):
    """Tables and fingerprints of the real package must work like those of `hub`."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "train.jsonl", *({"text": letter} for letter in "abcdefghij"))
    entry = {"path": str(tmp_path / "rows")}
    options = {"mask_prompt": False, "cache_dir": tmp_path, "splits": ["train", "valid"]}
    made = []
    for entries in (entry, entry, entry | {"train_split": "train[:50%]"}):
        corpora = load_corpora(Path(), Letters(), **options, hf_dataset=entries)
        made.append("".join(chr(i) for i in corpora["train"].tokens if i > 1))
        assert [chr(i) for i in corpora["valid"].tokens if i > 1] == ["j"]
    assert made == ["abcdefgh", "abcdefgh", "abcde"]
    kept = [path.name for path in (tmp_path / "tokens").iterdir()]
    assert len(kept) == 3


def test_packing_predicts_every_token_once():
    """The last token of a window is the first of the next."""
    corpus = corpus_of(np.arange(50), np.arange(50, 101))
    batches = Batches(corpus, packing="concat", length=10, batch_size=2, seed=0)
    assert batches.per_epoch == 5
    targets = np.concatenate([batches.next().targets.ravel() for _ in range(5)])
    assert sorted(targets.tolist()) == list(range(1, 101))
    again = np.concatenate([batches.next().targets.ravel() for _ in range(5)])
    assert sorted(again.tolist()) == list(range(1, 101))
    assert again.tolist() != targets.tolist()


def test_prompts_are_left_out_of_the_loss_in_packed_rows_too():
    """Targets inside prompts (lengths 3 and 2) have weight 0."""
    corpus = corpus_of(np.arange(6), np.arange(10, 15), prompts=[3, 2])
    batch = Batches(corpus, packing="concat", length=10, batch_size=1, seed=0).next()
    assert batch.targets.tolist() == [[1, 2, 3, 4, 5, 10, 11, 12, 13, 14]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 1, 0, 0, 1, 1, 1]]


def test_plain_batches_have_texts_of_similar_length():
    """mlx-lm sorts by a constant, so its batches have more padding than needed."""
    texts = [np.full(length, length) for length in (100, 5, 90, 7, 40, 6)]
    corpus = corpus_of(*texts, prompts=[50, 0, 0, 0, 0, 0])
    batches = Batches(corpus, packing="plain", length=64, batch_size=2, seed=0)
    shapes = sorted(batch.tokens.shape for batch in batches.some(batches.per_epoch))
    assert shapes == [(2, 32), (2, 64), (2, 64)]
    for batch in batches.some(99):
        lengths = {int(row[0]) for row in batch.tokens}
        assert lengths in ({5, 6}, {7, 40}, {90, 100})
        for row, targets, weights in zip(*batch, strict=True):
            counted = min(row[0] - 1, 64) - (49 if row[0] == 100 else 0)
            assert weights.sum() == counted
            assert (targets[weights > 0] == row[0]).all()


@pytest.mark.parametrize("items", [3, 5, 8])
@pytest.mark.parametrize("packing", ["concat", "plain"])
def test_an_epoch_has_each_row_once(packing, items):
    """Remaining rows were never read, and with few windows some were read twice."""
    corpus = corpus_of(*(np.full(10, i) for i in range(items)), [99])
    batches = Batches(corpus, packing=packing, length=10, batch_size=min(4, items), seed=0)
    rows = [row for batch in batches.some(-1) for row in batch.tokens]
    assert sorted(row[0] for row in rows) == list(range(items))


def test_plain_rows_without_a_token_to_learn_are_skipped():
    """A prompt may fill its row. Texts that lose their end are counted."""
    texts = [np.full(length, length) for length in (30, 100, 90, 20, 1)]
    corpus = corpus_of(*texts, prompts=[30, 65, 10, 0, 0])
    batches = Batches(corpus, packing="plain", length=64, batch_size=1, seed=0)
    assert (batches.cut, batches.mute) == (1, 3)
    assert sorted(batch.tokens[0, 0] for batch in batches.some(-1)) == [20, 90]


@pytest.mark.parametrize("packing", ["concat", "plain"])
def test_the_order_of_batches_resumes_from_its_state(packing):
    """The order must also resume across the end of an epoch."""
    corpus = corpus_of(*(np.full(11 + i, i) for i in range(6)))
    options = {"packing": packing, "length": 10, "batch_size": 2, "seed": 4}
    batches = Batches(corpus, **options)
    for _ in range(4):
        batches.next()
    state = json.loads(json.dumps(batches.state))
    rest = [batches.next().tokens.tolist() for _ in range(8)]
    resumed = Batches(corpus, **options)
    resumed.state = state
    assert [resumed.next().tokens.tolist() for _ in range(8)] == rest


def test_too_little_data_is_refused():
    """The error must say how much data there is and how much is needed."""
    corpus = corpus_of(np.arange(10))
    with pytest.raises(InputError, match="texts has 10 tokens, shorter than one sequence of 10"):
        Batches(corpus, packing="concat", length=10, batch_size=1, seed=0)
    with pytest.raises(
        InputError, match="1 texts with a token to learn within --max-seq-length 10, fewer"
    ):
        Batches(corpus, packing="plain", length=10, batch_size=2, seed=0)
    small = Batches(corpus_of(np.arange(12)), packing="concat", length=10, batch_size=3, seed=0)
    assert small.next().tokens.shape == (3, 10)
