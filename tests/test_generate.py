"""The generate command as a user types it, on golden checkpoints."""

import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_clex.convert import convert
from mlx_lm.generate import generate as stock_generate
from mlx_lm.generate import setup_arg_parser, stream_generate
from mlx_lm.models.cache import make_prompt_cache as stock_make_prompt_cache
from mlx_lm.models.cache import save_prompt_cache

from mlx_clex import bundled, generate, load, make_prompt_cache
from mlx_clex.serving import prompt

from .conftest import GOLDEN, GOLDEN_NAMES, stock_folder

SENTENCE = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command in this process: (status, stdout, stderr)."""

    def run(*args, stdin=""):
        stream = SimpleNamespace(buffer=io.BytesIO(stdin.encode()))
        monkeypatch.setattr(sys, "stdin", stream)
        try:
            status = generate.main([str(arg) for arg in args])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return clex_llama in float32; in bfloat16 two equal computations may pick other tokens."""
    return convert(GOLDEN / "clex_llama", tmp_path_factory.mktemp("f32") / "m", dtype="float32")


@pytest.fixture(scope="session")
def wide(tmp_path_factory, model):
    """Return a random CLEX with heads of 32 dimensions, which can be quantised."""
    folder = tmp_path_factory.mktemp("wide")
    source = stock_folder(folder, model, vocab_size=512)
    return convert(source, folder / "m", scaling={"type": "clex", "max_factor": 16})


def text_of(out):
    return out.split("=" * 10)[1].strip("\n")


def prompt_of(folder, tokens):
    """Return a text with exactly this number of tokens."""
    _, tokenizer = load(folder)
    text = SENTENCE * 40
    while len(tokenizer.encode(text)) > tokens:
        text = text[:-1]
    assert len(tokenizer.encode(text)) == tokens
    return text


def test_it_streams_and_reports(cli, model):
    """Output has text, speeds, memory, the final scale and the reach."""
    status, out, err = cli("--model", model, "--prompt", SENTENCE * 4, "--max-tokens", "40")

    assert (status, err) == (0, "")
    prompt, answer, memory, scale = out.strip().splitlines()[-4:]
    assert prompt.startswith("Prompt: ")
    assert answer.startswith("Generation: 40 tokens")
    assert memory.startswith("Peak memory: ")
    read = int(prompt.split()[1])
    assert scale == f"Scale: {-(-(read + 40) // 32)}, reach: 256 tokens"


def test_the_answer_is_that_of_greedy_decoding(cli, model):
    """Against the library, token by token, at the scale and gain of the whole prompt."""
    prompt = SENTENCE * 4
    loaded, tokenizer = load(model)
    ids = tokenizer.encode(prompt)
    cache = make_prompt_cache(loaded, expected_length=len(ids))
    logits = loaded(mx.array([ids]), cache=cache)
    tokens = []
    for _ in range(30):
        tokens.append(logits[0, -1].argmax().item())
        if tokens[-1] in tokenizer.eos_token_ids:
            break
        logits = loaded(mx.array([[tokens[-1]]]), cache=cache)
    _, out, _ = cli("--model", model, "--prompt", prompt, "-m", "30", "--prefill-step-size", "7")

    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert text_of(out) == detokenizer.text.strip("\n")


def test_grow_is_what_stock_programs_give(cli, model):
    """In stock mlx_lm.generate, each chunk has the scale of the text read so far."""
    prompt = SENTENCE * 4
    loaded, tokenizer = load(model)
    stock = stock_generate(loaded, tokenizer, prompt, max_tokens=30, prefill_step_size=9)
    options = ("--model", model, "--prompt", prompt, "-m", "30", "--prefill-step-size", "9")
    _, grown, _ = cli(*options, "--scale", "grow")
    _, planned, _ = cli(*options)

    assert text_of(grown) == stock.strip("\n")
    assert text_of(grown) != text_of(planned), "the two policies must differ here"


@pytest.mark.filterwarnings("ignore:.*past the 80 that this model's scaling")
def test_a_number_fixes_the_scale(cli, model):
    """--scale accepts any real number, also one below the scale of the length."""
    status, out, _ = cli("--model", model, "--prompt", SENTENCE * 4, "--scale", "2.5", "-m", "20")
    assert status == 0
    assert "Scale: 2.5, reach: 256 tokens" in out


def test_prompts_come_from_files_and_stdin(cli, model, tmp_path):
    """--prompt-file FILE, --prompt-file -, --prompt -, and a question after a document."""
    text = SENTENCE * 3
    (tmp_path / "text.txt").write_text(text)
    _, direct, _ = cli("--model", model, "--prompt", text)
    for args, stdin in [
        (("--prompt-file", tmp_path / "text.txt"), ""),
        (("--prompt-file", "-"), text),
        (("--prompt", "-"), text),
    ]:
        _, out, _ = cli("--model", model, *args, stdin=stdin)
        assert text_of(out) == text_of(direct)
    _, both, _ = cli("--model", model, "--prompt-file", "-", "--prompt", "Why?", stdin=text)
    _, same, _ = cli("--model", model, "--prompt", text + "\n\nWhy?")
    assert text_of(both) == text_of(same)


def test_only_the_answer_without_verbose(cli, model):
    """--verbose F is for scripts: nothing but the text on stdout."""
    _, verbose, _ = cli("--model", model, "-m", "12")
    status, out, err = cli("--model", model, "-m", "12", "--verbose", "F")
    assert status == 0
    assert out.strip("\n") == text_of(verbose)
    assert err == ""


def test_a_long_prefill_shows_its_progress(cli, model, monkeypatch):
    """On stderr, so that stdout stays the text."""
    monkeypatch.setattr(generate, "_LONG_PROMPT", 16)
    _, out, err = cli(
        "--model", model, "--prompt", SENTENCE * 4, "--prefill-step-size", "16", "-m", "4"
    )
    assert "Reading" in err
    assert "100%" in err
    assert "Reading" not in out


def test_a_bar_moves_before_the_first_full_pass(cli, model, monkeypatch):
    """A prompt shorter than --prefill-step-size jumped from nothing to 100 %."""
    monkeypatch.setattr(generate, "_LONG_PROMPT", 16)
    monkeypatch.setattr(prompt, "_SMALLEST_PASS", 8)
    _, _, err = cli("--model", model, "--prompt", SENTENCE * 4, "-m", "4")
    shares = {int(share) for share in re.findall(r"(\d+)%", err)}
    assert len(shares - {0, 100}) >= 4, err


def test_max_tokens_stops_at_a_hard_reach(cli, model):
    """The answer ends at the reach of 256 tokens, and one line says so."""
    status, out, err = cli(
        "--model", model, "--prompt", prompt_of(model, 250), "--max-tokens", "100"
    )
    assert status == 0
    assert err.strip().endswith("Generating at most 6 tokens: the model reaches 256.")
    assert len(err.strip().splitlines()) == 1
    assert "Generation: 6 tokens" in out
    assert "Scale: 8," in out


def test_a_prompt_beyond_the_reach_is_refused(cli, model):
    """The error has the length, the reach, and what to do."""
    for tokens in (256, 300):
        status, _, err = cli("--model", model, "--prompt", prompt_of(model, tokens))
        assert status == 2
        for word in (f"{tokens} tokens", "reaches 256", "Shorten", "max_factor"):
            assert word in err
        assert len(err.strip().splitlines()) == 1


def test_methods_without_an_end_take_any_length(cli, converted):
    """GeNE: the scale grows on past its factor."""
    folder = converted("gene_llama")
    status, out, _ = cli("--model", folder, "--prompt", prompt_of(folder, 600), "-m", "5")
    assert status == 0
    assert "Scale: 10, reach: 512 tokens, past which the scale grows" in out


def test_kv_bits_plans_for_the_whole_length(cli, wide, model):
    """Quantised keys are never rotated: prompt and answer together set the scale."""
    options = ("--model", wide, "--prompt", prompt_of(wide, 40), "-m", "80", "--temp", "0")
    quantised = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
    status, out, err = cli(*options, *quantised)
    assert status == 0, err
    assert "the scale is fixed at 8, the scale of 120 tokens" in err
    assert "Scale: 8," in out
    _, fixed, err = cli(*options, *quantised, "--scale", "8")
    assert "fixed" not in err
    assert text_of(out) == text_of(fixed)

    status, _, err = cli("--model", model, *options[2:], *quantised)
    assert status == 2, "heads of 16 dimensions cannot be quantised in groups of 32"
    assert "--kv-group-size" in err
    assert len(err.strip().splitlines()) == 2


def test_kv_bits_needs_an_end(cli, converted):
    """Without a maximum length there is no scale to fix."""
    options = ("--model", converted("gene_llama"), "--kv-bits", "8", "--max-tokens", "-1")
    status, _, err = cli(*options)
    assert status == 2
    assert "--scale NUMBER" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--scale", "banana"), ["--scale", "prompt, grow", "'banana'"]),
        (("--scale", "0.5"), ["--scale", "'0.5'"]),
        (("--scale", "nan"), ["--scale", "'nan'"]),
        (("--scale", "9"), ["1..8", "9"]),
        (("--max-kv-size", "100"), ["--max-kv-size", "--kv-bits"]),
        (("--max-tokens", "0"), ["--max-tokens", "0"]),
        (("--max-tokens", "-5"), ["--max-tokens", "-5"]),
        (("--max-tokens", "many"), ["--max-tokens", "many"]),
        (("--prompt-file", "/nowhere/at.all"), ["--prompt-file", "/nowhere/at.all"]),
        (("--prompt", "-", "--prompt-file", "-"), ["stdin"]),
        (("--image", "cat.png"), ["--image"]),
        (("--prompt", " "), ["empty", "--prompt-file"]),
        (("--prompt-file", "-"), ["empty"]),
        (("--kv-bits", "7"), ["--kv-bits", "7"]),
        (("--prefill-step-size", "0"), ["--prefill-step-size"]),
        (("--chat-template-config", "{"), ["--chat-template-config"]),
        (("--temp", "1", "--min-p", "2"), ["--min-p", "0..1", "2"]),
        (("--chat-template-config", "[1]"), ["--chat-template-config"]),
        (("--chat-template-config", '{"add_generation_prompt": false}'), ["'add_generation_"]),
        (("--chat-template-config", '{"messages": []}'), ["'messages'", "Leave it out"]),
        (("--use-default-chat-template",), ["--use-default-chat-template: transformers"]),
        (("--system-prompt", "be"), ["--system-prompt needs a chat template", "has none"]),
        (("--prefill-response", "a"), ["--prefill-response needs a chat template"]),
        (("--seed", "-1"), ["--seed", "0..4294967295", "-1"]),
        (("--seed", str(1 << 64)), ["--seed", "0..4294967295"]),
        (("--adapter-path", "/nowhere"), ["/nowhere", "adapter_config.json"]),
        (("--prompt-cache-file", "/nowhere"), ["There is no file", "/nowhere"]),
        (("--model", "/nowhere/model"), ["/nowhere/model", "no folder or file"]),
        (("--extra-eos-token", "foo"), ["'foo'", "vocab_size (512)", "--extra-eos-token"]),
        (("--extra-eos-token", "512"), ["'512'", "vocab_size (512)"]),
        (("--extra-eos-token", "-1"), ["'-1'", "vocab_size (512)"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_status_two(cli, model, args, words):
    """Never a traceback, never a usage page, nothing on stdout."""
    status, out, err = cli("--model", model, *args)

    assert status == 2, err
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert all(word in err for word in words), err


def test_an_end_token_ends_the_answer(cli):
    """It is given as a token or as its id."""
    options = ("--model", "bundled:base", "-m", "20", "--temp", "0")
    whole = text_of(cli(*options)[1])
    tokenizer = load(bundled.MODELS["base"])[1]
    ids = tokenizer.encode(whole, add_special_tokens=False)
    end = ids[len(ids) // 2]
    for given in (tokenizer.convert_ids_to_tokens(end), end):
        status, out, err = cli(*options, "--extra-eos-token", given)
        assert status == 0, err
        assert len(text_of(out)) < len(whole)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_published_format_generates(cli, converted, name):
    """In the type it was published in; MLX multiplies experts on the CPU only in float32."""
    status, out, err = cli("--model", converted(name), "--prompt", "hello", "--max-tokens", "20")
    assert status == 0, err
    assert "Generation: " in out


def test_a_run_that_fails_is_one_line_and_status_one(cli, model, monkeypatch):
    """Out of memory is exit status 1, without a traceback."""

    def fail(*args, **kwargs):
        raise RuntimeError("[metal::malloc] Attempting to allocate 99 bytes\nwhich is too much")
        yield

    monkeypatch.setattr(generate, "stream_generate", fail)
    status, _, err = cli("--model", model)
    assert status == 1
    assert len(err.strip().splitlines()) == 1
    assert "99 bytes which" in err


def test_without_options_the_bundled_model_writes(cli):
    """The first command of a new user must run without a download."""
    status, out, _ = cli("--max-tokens", "20")
    assert status == 0
    assert "Scale: 1, reach: 2048 tokens" in out


def test_a_chat_template_is_applied_and_can_be_left_out(cli, model, tmp_path):
    """System prompt, prefilled answer and --ignore-chat-template, as in mlx_lm."""
    folder = shutil.copytree(model, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    _, out, _ = cli("--model", folder, "--prompt", "hi", "--system-prompt", "be", "-m", "5")
    _, raw, _ = cli("--model", model, "--prompt", "system: be user: hi assistant: ", "-m", "5")
    tokens = [int(text.split("Prompt: ")[1].split()[0]) for text in (out, raw)]
    assert tokens[0] in (tokens[1], tokens[1] - 1), "the template brings no BOS of its own"
    _, ignored, _ = cli("--model", folder, "--prompt", "hi", "--ignore-chat-template", "-m", "5")
    _, plain, _ = cli("--model", model, "--prompt", "hi", "-m", "5")
    assert text_of(ignored) == text_of(plain)


def test_a_saved_cache_is_continued(cli, model, tmp_path):
    """The document is not read again, and the scale is that of both texts together."""
    loaded, tokenizer = load(model)
    document = tokenizer.encode(SENTENCE * 3)
    cache = make_prompt_cache(loaded)
    loaded(mx.array([document]), cache=cache)
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache, {"model": str(model)})
    status, out, err = cli(
        "--model", model, "--prompt-cache-file", tmp_path / "c.safetensors", "--prompt", "And so",
        "-m", "20",
    )  # fmt: skip
    assert status == 0, err
    read = len(document) + int(out.split("Prompt: ")[1].split()[0])
    assert f"Scale: {-(-(read + 20) // 32)}," in out


@pytest.mark.parametrize("name", ["clex_llama", "clex_llama_gqa_log_scale"])
def test_a_draft_model_changes_nothing_but_the_speed(cli, name, tmp_path, converted):
    """Prompt and answer together set scale and gain, so a rejected token changes neither."""
    model = convert(GOLDEN / name, tmp_path / "m", dtype="float32")
    loaded, tokenizer = load(model)
    ids = tokenizer.encode(SENTENCE * 3)
    cache = make_prompt_cache(loaded, len(ids) + 40)
    parts = stream_generate(loaded, tokenizer, ids, max_tokens=40, prompt_cache=cache)
    plain = "".join(part.text for part in parts)
    options = ("--model", model, "--prompt", SENTENCE * 3, "-m", "40")
    status, drafted, err = cli(*options, "--draft-model", converted("clex_llama"))
    assert status == 0, err
    assert "--draft-model: the scale is fixed at 5" in err
    assert text_of(drafted) == plain.strip("\n")


@pytest.mark.parametrize("model", ["bundled:base", "bundled:gene"])
def test_a_draft_model_needs_an_end(cli, model):
    """Without a scaling the message was mlx-lm's, and of something else."""
    options = ("--model", model, "--draft-model", "bundled:base", "--prompt", "a")
    status, _, err = cli(*options, "--max-tokens", "-1")
    assert status == 2
    assert "Give --max-tokens a number" in err


def test_the_scale_is_that_of_the_model_and_not_of_its_draft(cli):
    """A model of a fixed scale has no cache with a scale; the draft's was told."""
    options = ("--model", "bundled:clex", "--draft-model", "bundled:gene", "--scale", "3")
    status, out, err = cli(*options, "--prompt", "And God", "--max-tokens", "8")
    assert status == 0, err
    assert "Scale: 3, reach" in out


def test_a_draft_model_of_a_shorter_reach_is_named(cli):
    """The message said that the model had this reach."""
    options = ("--model", "bundled:gene", "--draft-model", "bundled:clex", "--temp", "0", "-m", "9")
    status, _, err = cli(*options, "--prompt", "the king " * 1100)
    assert status == 2
    assert "draft model cannot read the prompt: it has 2202 tokens, and this model reaches" in err
    status, _, err = cli(*options, "--prompt", "the king " * 1020)
    assert status == 0, err
    assert "at most 6 tokens: the draft model reaches 2048" in err


def test_sampling_is_repeatable_with_a_seed(cli, model):
    """The same seed, the same text."""
    options = ("--model", model, "--temp", "1.0", "-m", "20", "--seed", "3")
    assert text_of(cli(*options)[1]) == text_of(cli(*options)[1])
    assert text_of(cli(*options[:-1], "4")[1]) != text_of(cli(*options)[1])


def test_options_are_those_of_mlx_lm():
    """Every option of mlx_lm.generate with its default, but for the prompt."""
    import argparse

    stock = setup_arg_parser()
    ours = argparse.ArgumentParser(parents=[setup_arg_parser()], conflict_handler="resolve")
    generate.add_arguments(ours)
    theirs = vars(stock.parse_args([]))
    mine = vars(ours.parse_args([]))

    assert set(theirs) <= set(mine)
    changed = {key for key in theirs if theirs[key] != mine[key]}
    assert changed == {"prompt"}
    assert set(mine) - set(theirs) == {"force", "pipeline", "prompt_file", "scale"}


def test_it_runs_as_a_module(model):
    """python -m mlx_clex.generate, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_clex.generate", "--model", str(model), "-m", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Generation: 3 tokens" in done.stdout
    options = ("--scale", "1", "--prompt", SENTENCE * 2, "-m", "3")
    warned = subprocess.run(
        [sys.executable, "-m", "mlx_clex.generate", "--model", str(model), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert warned.returncode == 0
    assert warned.stderr.count("\n") == 1, warned.stderr
    assert "are past the 32 that" in warned.stderr
    failed = subprocess.run(
        [sys.executable, "-m", "mlx_clex.generate", "--model", str(model), "--scale", "banana"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1


def test_mlx_lm_quantises_a_converted_folder(model, tmp_path):
    """mlx_lm.convert -q keeps the shim, the entry, and the scaling's float32 weights."""
    from mlx_lm.convert import convert as stock_convert

    target = tmp_path / "q"
    stock_convert(
        str(model), str(target), quantize=True, q_bits=8, q_group_size=32, dtype="bfloat16",
        trust_remote_code=True,
    )  # fmt: skip
    config = json.loads((target / "config.json").read_text())
    loaded, tokenizer = load(target)
    plain, _ = load(model)

    assert config["rope_scaling"]["type"] == "clex"
    assert config["quantization"]["bits"] == 8
    assert mx.array_equal(loaded.scaling.up_proj, plain.scaling.up_proj)
    ids = mx.array([tokenizer.encode(SENTENCE * 4)])
    assert mx.abs(loaded(ids) - plain(ids)).mean().item() < 0.1
    assert stock_make_prompt_cache(loaded)[0].scale is None
