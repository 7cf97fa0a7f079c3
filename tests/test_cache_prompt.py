"""A document is read once and saved; only the same model continues it."""

import argparse
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_clex.convert import convert
from mlx_lm.cache_prompt import setup_arg_parser as stock_parser
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from mlx_clex import cache_prompt, generate, load, make_prompt_cache
from mlx_clex.checkpoint.fingerprint import fingerprint
from mlx_clex.checkpoint.prompt_cache import load_cache
from mlx_clex.errors import InputError
from mlx_clex.model.cache import ScaledKVCache, ScaledQuantizedKVCache
from mlx_clex.serving.conversation import Conversation

from .conftest import GOLDEN, random_adapters, stock_folder

SENTENCE = "The quick brown fox jumps over the lazy dog. "
DOCUMENT = SENTENCE * 4
QUERY = "And so"
COUNT = 20  # tokens of an answer
EIGHT_BITS = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run a command in this process: (status, stdout, stderr)."""

    def run(module, *args, stdin=""):
        stream = SimpleNamespace(buffer=io.BytesIO(stdin.encode()))
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()  # of conversions meanwhile
        try:
            status = module.main([str(arg) for arg in args])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function from a name to a converted folder, in float32."""
    made = {}

    def folder(name):
        if name not in made:
            target = tmp_path_factory.mktemp("models") / name
            if name == "wide":  # heads of 32 dimensions, which can be quantised
                source = stock_folder(target.parent, GOLDEN / "clex_llama", vocab_size=512)
                made[name] = convert(source, target, scaling={"type": "clex", "max_factor": 16})
            elif name == "stock":
                made[name] = stock_folder(target.parent, GOLDEN / "clex_llama", vocab_size=512)
            else:
                made[name] = convert(GOLDEN / name, target, dtype="float32")
        return made[name]

    return folder


def text_of(out):
    return out.split("=" * 10)[1].strip("\n")


def answer(folder, plan, *, scale=None, quantised=False):
    """The text of greedy decoding, through the library and without a file."""
    model, tokenizer = load(folder, scale=scale)
    document = tokenizer.encode(DOCUMENT)
    query = tokenizer.encode(QUERY, add_special_tokens=False)
    caches = make_prompt_cache(model, plan)
    # As mlx-lm reads: the last token by itself.
    for part in (document[:-1], document[-1:]):
        model(mx.array([part]), cache=caches)
    if quantised:
        caches = [cache.to_quantized(group_size=32, bits=8) for cache in caches]
    logits = model(mx.array([query]), cache=caches)
    detokenizer = tokenizer.detokenizer
    for _ in range(COUNT):
        token = logits[0, -1].argmax().item()
        if token in tokenizer.eos_token_ids:
            break
        detokenizer.add_token(token)
        logits = model(mx.array([[token]]), cache=caches)
    detokenizer.finalize()
    return detokenizer.text.strip("\n")


def length_of(folder, text):
    return len(load(folder)[1].encode(text))


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("clex_llama", ("--expected-length", "192"), ScaledKVCache),
        ("clex_llama_gqa_log_scale", ("--expected-length", "192"), ScaledKVCache),
        ("clex_llama", ("--scale", "grow"), ScaledKVCache),
        ("clex_llama", ("--scale", "5.5"), KVCache),
        ("wide", ("--expected-length", "192", *EIGHT_BITS), ScaledQuantizedKVCache),
        ("gene_param_llama", (), ScaledKVCache),
        ("stock", (), KVCache),
    ],
)
def test_the_answer_is_that_of_the_text_read_at_once(cli, folders, tmp_path, name, options, kind):
    """Every kind of cache must be loaded as it was saved."""
    folder, file = folders(name), tmp_path / "document.safetensors"
    cached = ("--model", folder, "--prompt-cache-file", file)
    status, out, err = cli(cache_prompt, *cached, "--prompt", DOCUMENT, *options)
    assert status == 0, err
    assert f"Prompt: {length_of(folder, DOCUMENT)} tokens" in out
    assert {type(cache) for cache in load_prompt_cache(str(file))} == {kind}

    policy = options[:2] if "--scale" in options else ()
    status, out, err = cli(
        generate, *cached, "--prompt", QUERY, "-m", COUNT, "--temp", "0", *policy
    )

    assert status == 0, err
    assert "saved text was read" not in err
    scale = float(policy[1]) if policy and policy[1] != "grow" else None
    plan = 192 if "--expected-length" in options else None
    expected = answer(folder, plan, scale=scale, quantised=kind is ScaledQuantizedKVCache)
    assert text_of(out) == expected


def test_a_query_past_the_plan_is_told(cli, folders, tmp_path):
    """Keys are rotated but values are not, which the answer does not show."""
    folder, file = folders("clex_llama"), tmp_path / "document.safetensors"
    cached = ("--model", folder, "--prompt-cache-file", file)
    tokens = length_of(folder, DOCUMENT)
    assert cli(cache_prompt, *cached, "--prompt", DOCUMENT)[0] == 0

    status, _, err = cli(generate, *cached, "--prompt", SENTENCE, "-m", "1")

    assert status == 0
    longer = tokens + len(load(folder)[1].encode(SENTENCE, add_special_tokens=False))
    assert f"--expected-length {longer}" in err
    options = ("--prompt", DOCUMENT, "--expected-length", longer)
    assert cli(cache_prompt, *cached, *options)[0] == 0
    assert cli(generate, *cached, "--prompt", SENTENCE, "-m", "1")[2] == ""


def test_a_rotation_that_does_not_happen_is_not_told(cli, folders, tmp_path):
    """A text read with --scale grow at scale 1 and continued at 1 was said to be rotated."""
    cached = ("--model", folders("clex_llama"), "--prompt-cache-file", tmp_path / "c.safetensors")
    for text, told in (("A fox", False), (SENTENCE, True)):
        assert cli(cache_prompt, *cached, "--prompt", text, "--scale", "grow")[0] == 0
        status, _, err = cli(generate, *cached, "--prompt", "And so", "-m", "1")
        assert (status, "are rotated" in err) == (0, told)


def test_scales_keep_all_their_digits(cli, tmp_path, folders):
    """mlx-lm saves numbers as float32, so keys at scale 2.3 were rotated to 2.3 again."""
    entry = {"type": "gene", "factor": 2.3}
    folder = convert(folders("stock"), tmp_path / "m", scaling=entry)
    cached = ("--model", folder, "--prompt-cache-file", tmp_path / "c.safetensors")
    assert cli(cache_prompt, *cached, "--prompt", "A fox")[0] == 0
    moves = []
    kept = ScaledKVCache.move_to

    def move(cache, scales, *rest):
        moves.extend(scales if cache.offset else [])
        kept(cache, scales, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScaledKVCache, "move_to", move)
        assert cli(generate, *cached, "--prompt", QUERY, "-m", "2")[0] == 0
    assert moves == []


def edited(folder, target, **config):
    """Return a copy of a folder with another config."""
    shutil.copytree(folder, target)
    entries = json.loads((target / "config.json").read_text())
    entries["rope_scaling"] |= config.pop("rope_scaling", {})
    (target / "config.json").write_text(json.dumps(entries | config))
    return target


def with_tensor(folder, target, name):
    """Return a copy of a folder with one tensor changed slightly."""
    shutil.copytree(folder, target)
    (file,) = target.glob("model*.safetensors")
    weights = dict(mx.load(str(file)))
    weights[name] = weights[name] * 1.01
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    return target


def test_a_cache_does_not_choose_what_is_downloaded(cli, folders, tmp_path):
    """Without --model, the model that a stranger's file names was fetched and loaded."""
    mine, file = folders("clex_llama"), tmp_path / "c.safetensors"
    assert cli(cache_prompt, "--model", mine, "--prompt-cache-file", file, "--prompt", "A")[0] == 0
    arrays, metadata = mx.load(str(file), return_metadata=True)
    renamed = {k: v.replace(str(mine), "someone/their-model") for k, v in metadata.items()}
    assert renamed != metadata
    mx.save_safetensors(str(file), arrays, metadata=renamed)
    status, _, err = cli(generate, "--prompt-cache-file", file, "--prompt", "A", "-m", "1")
    assert status == 2
    assert "someone/their-model, which is not on this machine. Give --model" in err


def test_caches_of_another_model_adapter_or_scaling_are_refused(cli, folders, tmp_path):
    """Each of them would silently give a wrong answer."""
    mine, file = folders("clex_llama"), tmp_path / "c.safetensors"
    assert cli(cache_prompt, "--model", mine, "--prompt-cache-file", file, "--prompt", "A")[0] == 0

    first = random_adapters(mine, tmp_path / "a", 1)
    second = random_adapters(mine, tmp_path / "b", 2)
    others = [
        (
            ("--model", folders("gene_llama")),
            ["made with clex_llama; you asked for gene_llama"],
        ),
        (
            ("--model", edited(mine, tmp_path / "e", rms_norm_eps=1e-6)),
            ["made with clex_llama; you asked for e"],
        ),
        (
            ("--model", with_tensor(mine, tmp_path / "w", "model.layers.1.mlp.up_proj.weight")),
            ["made with clex_llama; you asked for w"],
        ),
        (
            ("--model", with_tensor(mine, tmp_path / "s", "scaling.up_proj")),
            ["learned tensors of the scaling"],
        ),
        (
            ("--model", edited(mine, tmp_path / "f", rope_scaling={"max_factor": 16})),
            ['rope_scaling: {"act"', '"max_factor": 16,', '"max_factor": 8,'],
        ),
        (
            ("--model", edited(mine, tmp_path / "l", max_position_embeddings=64)),
            ["trained length: 32 in the file, 64 in this model"],
        ),
        (("--model", mine, "--scale", "2"), ["fixed scale: none in the file, 2.0 in this model"]),
        (("--model", mine, "--adapter-path", first), ["adapter: none in the file"]),
    ]
    for args, words in others:
        status, out, err = cli(generate, *args, "--prompt-cache-file", file, "--prompt", QUERY)
        assert (status, out) == (2, ""), err
        assert len(err.strip().splitlines()) == 1
        assert all(word in err for word in words), err
        assert err.count(" in the file, ") + err.count(": made with") == 1, err

    with_first = ("--model", mine, "--adapter-path", first, "--prompt-cache-file", file)
    assert cli(cache_prompt, *with_first, "--prompt", "A")[0] == 0
    assert cli(generate, *with_first, "--prompt", QUERY, "-m", "1")[0] == 0
    status, _, err = cli(
        generate, "--model", mine, "--adapter-path", second, "--prompt-cache-file", file
    )
    assert status == 2
    assert "adapter: " in err


def test_a_moved_copy_of_the_model_is_the_same_model(cli, folders, tmp_path):
    """Names and dates of files do not affect the answer."""
    mine, file = folders("clex_llama"), tmp_path / "c.safetensors"
    assert cli(cache_prompt, "--model", mine, "--prompt-cache-file", file, "--prompt", "A")[0] == 0
    copy = shutil.copytree(mine, tmp_path / "copy")
    assert cli(generate, "--model", copy, "--prompt-cache-file", file, "-m", "1")[0] == 0


def test_files_of_mlx_lm_are_taken_with_a_word(cli, folders, tmp_path):
    """They do not name their model, but caches of another kind are still refused."""
    mine, file = folders("clex_llama"), tmp_path / "c.safetensors"
    model, tokenizer = load(mine)
    caches = make_prompt_cache(model)
    model(mx.array([tokenizer.encode(DOCUMENT)]), cache=caches)
    save_prompt_cache(str(file), caches)

    status, _, err = cli(generate, "--model", mine, "--prompt-cache-file", file, "-m", "1")
    assert status == 0
    assert "does not name its model" in err
    status, _, err = cli(
        generate, "--model", mine, "--prompt-cache-file", file, "-m", "1", "--scale", "2"
    )
    assert status == 2
    assert "2 ScaledKVCache in the file, 2 KVCache in the model" in err


def test_a_chat_goes_on_inside_the_users_message(cli, folders, tmp_path):
    """Text and query are one message; the template is not opened twice."""
    folder = shutil.copytree(folders("clex_llama"), tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    cached = ("--model", folder, "--prompt-cache-file", tmp_path / "c.safetensors")
    _, first, _ = cli(cache_prompt, *cached, "--prompt", "A fox.")
    _, second, _ = cli(generate, *cached, "--prompt", " A dog.", "-m", "1")
    tokenizer = load(folder)[1]

    def count(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    assert f"Prompt: {count('<user> A fox.')} tokens" in first
    assert f"Prompt: {count(' A dog.</s><assistant>')} tokens" in second
    _, bare, _ = cli(cache_prompt, *cached, "--prompt", "A fox.", "--ignore-chat-template")
    assert f"Prompt: {len(tokenizer.encode('A fox.'))} tokens" in bare


def test_the_suffix_may_be_left_out(cli, folders, tmp_path):
    """mlx writes c.safetensors for c, and loading c then failed."""
    cached = ("--model", folders("clex_llama"), "--prompt-cache-file", tmp_path / "c")
    (tmp_path / "text.txt").write_text(DOCUMENT)
    assert cli(cache_prompt, *cached, "--prompt-file", tmp_path / "text.txt")[0] == 0
    assert cli(generate, *cached, "-m", "1")[0] == 0
    assert [file.name for file in tmp_path.glob("*c*")] == ["c.safetensors"]
    # A text of that name was taken for the cache, and told to be corrupt.
    (tmp_path / "c").write_text(DOCUMENT)
    assert cli(generate, *cached, "-m", "1")[0] == 0


def test_a_conversation_is_no_cached_text(cli, folders, tmp_path):
    """The prompt was read as the rest of the last answer."""
    folder = folders("clex_llama")
    model, tokenizer = load(folder)
    identity = fingerprint(model, Path(folder))
    conversation = Conversation(model, tokenizer, identity=identity, max_tokens=2)
    list(conversation.answer("A cat."))
    file = conversation.save(tmp_path / "talk")
    status, _, err = cli(generate, "--model", folder, "--prompt-cache-file", file, "-m", "1")
    assert status == 2
    assert "is a conversation of `mlx_clex chat`: go on with it there, with /restore." in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["--prompt", "--prompt-file"]),
        (("--prompt", ""), ["empty"]),
        (("--prompt", DOCUMENT, "--expected-length", "20"), ["--expected-length 20", "text"]),
        (
            ("--prompt", DOCUMENT, "--expected-length", "300"),
            ["of --expected-length", "256"],
        ),
        (("--prompt", DOCUMENT * 9), ["reach", "256"]),
        (("--prompt", DOCUMENT * 999), ["bytes", "reaches 256 tokens"]),
        (("--prompt", "A", "--expected-length", "9", "--scale", "2"), ["--scale prompt"]),
        (("--prompt", "A", "--scale", "9"), ["1..8"]),
        (("--prompt", "A", "--max-kv-size", "9"), ["--max-kv-size"]),
        (("--prompt", "A", "--kv-bits", "7"), ["--kv-bits", "7"]),
        (("--prompt", "A", "--kv-bits", "8", "--quantized-kv-start", "0"), ["--kv-group-size"]),
        (("--prompt", "A", "--prompt-cache-file", "/nowhere/c"), ["/nowhere"]),
        (("--prompt", "A", "--model", "/nowhere"), ["/nowhere"]),
        (("--prompt-file", "/nowhere"), ["--prompt-file"]),
        (("--prompt", "A", "--eos-token", "STOP"), ["'STOP'", "512", "cache_prompt --eos-token"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(cli, folders, tmp_path, args, words):
    """Where possible, it is refused before the text is read."""
    base = ("--model", folders("clex_llama"), "--prompt-cache-file", tmp_path / "c.safetensors")
    status, _, err = cli(cache_prompt, *base, *args)
    assert status == 2
    assert all(word in err.strip().splitlines()[-1] for word in words), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".", "", "/", "..", "notes/"])
def test_a_name_of_no_file_is_refused(cli, folders, tmp_path, monkeypatch, name):
    """A traceback; in a chat, the end of the conversation that was to be saved."""
    monkeypatch.chdir(tmp_path)
    for command in (cache_prompt, generate):
        asked = ("--model", folders("clex_llama"), "--prompt", "A", "--prompt-cache-file", name)
        status, _, err = cli(command, *asked)
        assert (status, "names no file: give one" in err) == (2, True), err


def test_only_a_saved_cache_is_replaced(cli, folders, tmp_path):
    """A model's weights were replaced; a whole text was read before a folder was found closed."""
    weights = tmp_path / "model.safetensors"
    shutil.copy(folders("clex_llama") / "model.safetensors", weights)
    before = weights.read_bytes()
    asked = ("--model", folders("clex_llama"), "--prompt", "A", "--prompt-cache-file")
    status, _, err = cli(cache_prompt, *asked, weights)
    assert (status, "is no saved cache: give another name" in err) == (2, True)
    assert weights.read_bytes() == before
    status, _, err = cli(cache_prompt, *asked, "/proc/c")
    assert (status, "/proc/c.safetensors cannot be written" in err) == (2, True)
    for _ in range(2):
        assert cli(cache_prompt, *asked, tmp_path / "c")[0] == 0


def test_a_text_longer_than_a_plain_model_was_trained_on_is_told(cli, folders, tmp_path):
    """Only models with a scaling warned."""
    stock = folders("stock")
    config = json.loads((stock / "config.json").read_text()) | {"max_position_embeddings": 16}
    shutil.copytree(stock, tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    model = ("--model", tmp_path / "short", "--prompt")
    for command, more in ((generate, ("-m", 1)), (cache_prompt, ("--prompt-cache-file", "c"))):
        where = (*more[:-1], tmp_path / "c") if command is cache_prompt else more
        assert "trained on 16; answers get worse" in cli(command, *model, DOCUMENT, *where)[2]
        assert "answers get worse" not in cli(command, *model, "A", *where)[2]


@pytest.mark.parametrize("size", [0, 5, 200, 2000])
def test_a_broken_file_is_refused(cli, folders, tmp_path, size):
    """For example, a copy may be cut off."""
    base = ("--model", folders("clex_llama"), "--prompt-cache-file", tmp_path / "c.safetensors")
    assert cli(cache_prompt, *base, "--prompt", "A")[0] == 0
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:size])
    status, _, err = cli(generate, *base)
    assert status == 2
    assert "no saved cache" in err
    assert len(err.strip().splitlines()) == 1


def test_a_scale_that_the_model_does_not_have_is_refused(cli, folders, tmp_path):
    """A conversation with it was restored, and every later answer failed."""
    base = ("--model", folders("clex_llama"), "--prompt-cache-file", tmp_path / "c.safetensors")
    assert cli(cache_prompt, *base, "--prompt", "A")[0] == 0
    caches, metadata = load_prompt_cache(str(base[3]), return_metadata=True)
    entry = json.loads(metadata["mlx_clex"])
    metadata["mlx_clex"] = json.dumps(entry | {"scales": [1e308] * len(caches)})
    save_prompt_cache(str(base[3]), caches, metadata)
    model, _ = load(base[1])
    with pytest.raises(InputError, match=r"must be within 1\.\.8 .*got 1e\+308"):
        load_cache(base[3], model, entry["fingerprint"])


def test_weights_are_no_cache(cli, folders):
    """A safetensors file with other tensors must be refused."""
    folder = folders("clex_llama")
    status, _, err = cli(
        generate, "--model", folder, "--prompt-cache-file", folder / "model.safetensors"
    )
    assert status == 2
    assert "no saved cache" in err


def test_bits_must_be_those_of_the_file(cli, folders, tmp_path):
    """mlx-lm would ignore the option and use the bits of the file."""
    cached = ("--model", folders("wide"), "--prompt-cache-file", tmp_path / "c.safetensors")
    assert cli(cache_prompt, *cached, "--prompt", DOCUMENT, *EIGHT_BITS)[0] == 0
    status, _, err = cli(generate, *cached, "--kv-bits", "4", "-m", "1")
    assert status == 2
    assert "--kv-bits 8 --kv-group-size 32" in err


def test_a_disk_that_is_full_leaves_the_old_file(cli, folders, tmp_path, monkeypatch):
    """The old file was deleted before the new one was complete."""
    cached = ("--model", folders("clex_llama"), "--prompt-cache-file", tmp_path / "c.safetensors")
    assert cli(cache_prompt, *cached, "--prompt", "A")[0] == 0

    def full(file, *_):
        with open(file, "w") as unfinished:  # noqa: PTH123 - a str, as mlx-lm gets it
            unfinished.write("x")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("mlx_clex.checkpoint.prompt_cache.save_prompt_cache", full)
    status, _, err = cli(cache_prompt, *cached, "--prompt", "B")
    assert status == 1
    assert "No space left" in err
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    assert load_prompt_cache(str(tmp_path / "c.safetensors"))


def test_options_are_those_of_mlx_lm():
    """Every option of mlx_lm.cache_prompt with its default, but for the text."""
    ours = argparse.ArgumentParser(parents=[stock_parser()], conflict_handler="resolve")
    cache_prompt.add_arguments(ours)
    needed = ["--prompt-cache-file", "c", "--prompt", "A"]
    theirs, mine = vars(stock_parser().parse_args(needed)), vars(ours.parse_args(needed))
    assert {name: mine[name] for name in theirs} == theirs | {"model": "bundled:clex"}


def test_the_answer_ends_where_the_cache_says(cli, folders, tmp_path):
    """--eos-token was written to the file and read by nobody."""
    folder, file = folders("stock"), tmp_path / "c.safetensors"
    ask = ("--prompt-cache-file", file, "--prompt", QUERY, "-m", str(COUNT))
    write = ("--model", folder, "--prompt", DOCUMENT, "--prompt-cache-file", file)
    assert cli(cache_prompt, *write)[0] == 0
    _, whole, _ = cli(generate, *ask)
    tokenizer = load(folder)[1]
    ids = tokenizer.encode(text_of(whole), add_special_tokens=False)
    end = tokenizer.convert_ids_to_tokens(ids[len(ids) // 2])
    file.unlink()
    assert cli(cache_prompt, *write, "--eos-token", end)[0] == 0
    status, cut, err = cli(generate, *ask)
    assert status == 0, err
    assert len(text_of(cut)) < len(text_of(whole))


def test_a_file_with_an_end_token_of_no_model_is_refused(cli, folders, tmp_path):
    """The tokenizer got a token beyond the embedding, and MLX read past it."""
    folder, file = folders("stock"), tmp_path / "c.safetensors"
    write = ("--model", folder, "--prompt", DOCUMENT, "--prompt-cache-file", file)
    assert cli(cache_prompt, *write)[0] == 0
    caches, metadata = load_prompt_cache(str(file), return_metadata=True)
    metadata["tokenizer_config"] = json.dumps({"eos_token": "STOP"})
    save_prompt_cache(str(file), caches, metadata)
    status, _, err = cli(generate, "--prompt-cache-file", file, "--prompt", QUERY)
    assert (status, "'STOP' is no token of this model" in err) == (2, True), err


def test_a_system_prompt_comes_too_late(cli, folders, tmp_path):
    """It was silently left out."""
    file = tmp_path / "c.safetensors"
    folder = folders("stock")
    write = ("--model", folder, "--prompt", DOCUMENT, "--prompt-cache-file", file)
    assert cli(cache_prompt, *write)[0] == 0
    ask = ("--prompt-cache-file", file, "--prompt", QUERY, "--system-prompt", "Be brief.")
    status, _, err = cli(generate, *ask)
    assert status == 2
    assert "--system-prompt would stand before the text" in err


def test_the_scale_that_is_told_is_that_of_the_cache(cli, folders, tmp_path):
    """The note named the scale of prompt and answer, and the answer had the file's."""
    folder, file = folders("wide"), tmp_path / "c.safetensors"
    write = ("--model", folder, "--prompt", DOCUMENT, "--prompt-cache-file", file)
    status, _, err = cli(cache_prompt, *write, *EIGHT_BITS, "--expected-length", "240")
    assert status == 0, err
    _, out, err = cli(generate, "--prompt-cache-file", file, "--prompt", QUERY, "-m", "5")
    (told,) = re.findall(r"the scale is fixed at (\S+), the scale of 240 tokens", err)
    assert f"Scale: {told}" in out
