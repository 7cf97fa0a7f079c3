"""Options: those of mlx-lm are taken or pointed at ours, and every one is explained."""

import argparse
import importlib
import sys

import pytest

from mlx_clex.__main__ import NAMES
from mlx_clex.commands import run_command as runner

# Commands that mlx-lm has under the same name.
THEIRS = [name for name in NAMES if importlib.util.find_spec(f"mlx_lm.{name}")]


class Built(Exception):  # noqa: N818 - it is no error
    """Carries a parser out of the function that builds it."""


def parser_of(module, monkeypatch, kind=argparse.ArgumentParser):
    def stop(self, *_, **__):
        raise Built(self)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "parse_args", stop)
        patched.setattr(sys, "argv", ["command"])
        with pytest.raises(Built) as built:
            module.main()
    return built.value.args[0]


def ours(name, monkeypatch):
    module = importlib.import_module(
        f"mlx_clex.{'convert.__main__' if name == 'convert' else name}"
    )
    return parser_of(module, monkeypatch, runner._Parser)


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


def test_mlx_lm_is_what_we_think():
    """A renamed module of mlx-lm would empty the tests below."""
    assert {"generate", "chat", "server", "lora", "fuse", "convert", "perplexity"} <= set(THEIRS)


@pytest.mark.parametrize("name", THEIRS)
def test_every_option_of_mlx_lm_is_known(name, monkeypatch):
    """`perplexity --data-path` was "unrecognized arguments", with no word of --data."""
    theirs = parser_of(importlib.import_module(f"mlx_lm.{name}"), monkeypatch)
    missing = options_of(theirs) - options_of(ours(name, monkeypatch))
    assert not missing


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["perplexity", "--batch-size", "8"], "Short windows are batched automatically"),
        (["evaluate", "--output-dir", "x"], "Use --output PREFIX"),
        (["fuse", "--model", "m", "--export-gguf"], "--freeze SCALE --for llama.cpp"),
    ],
)
def test_options_with_another_name_are_pointed_at_ours(argv, words, monkeypatch, capsys):
    """The advice is one line, and the exit status 2."""
    name, *rest = argv
    with pytest.raises(SystemExit) as ended:
        ours(name, monkeypatch).parse_args(rest)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_meaning_and_a_default(name, monkeypatch):
    """`--act` said "Default: clex tanh.", and `--clear-cache-threshold` said ==SUPPRESS==."""
    parser = ours(name, monkeypatch)
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    for each in parsers:
        for action in each._actions:
            if action.dest in ("help", "_elsewhere") or (action.choices and not action.help):
                continue
            text = each._get_formatter()._get_help_string(action)
            assert text, action
            assert "SUPPRESS" not in text, action
            words = text.partition("Default:")[0].split()
            assert len(words) >= 2, f"{action.option_strings}: {text}"
            flag = isinstance(action.default, bool) or action.nargs == 0
            told = "efault" in text or text.startswith("Refused") or action.required or flag
            told = told or not action.option_strings
            assert told, f"{action.option_strings} does not tell its default: {text}"


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_with_an_example(name, monkeypatch):
    """The example is a command line that the parser takes."""
    parser = ours(name, monkeypatch)
    assert parser.format_help().rstrip().splitlines()[-2] == "example:"
    line = parser.epilog.splitlines()[-1].strip()
    assert line.startswith(f"mlx_clex {name} ")
