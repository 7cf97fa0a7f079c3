"""Options from YAML files: which win, and which are refused."""

import pytest

from mlx_clex import load

from .commands import argv_for, call, options, parse

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("eval_lengths: 64", "in a YAML file [4096, 8192], got 64"),
        ("eval_lengths: [64, true]", "in a YAML file [4096, 8192]"),
        ("lora_parameters: 8", "lora_parameters must be a block"),
        ("optimizer_config: 3", "optimizer_config must be a block"),
        ("report_to: 3", "--report-to must be text"),
        ("project_name: 2025-11-27", "--project-name must be text (in quotes)"),
        ('mask_prompt: "no"', "--mask-prompt must be true or false, got 'no'"),
        ("warmup: 5\nlr_schedule: {name: cosine_decay, arguments: [1e-3, 9]}", "leave them out"),
    ],
)
def test_a_yaml_value_of_another_kind_is_one_line(base, texts, tmp_path, line, match, capsys):
    """They were tracebacks, and "no" was taken for yes."""
    file = tmp_path / "c.yaml"
    file.write_text(line + "\n")
    assert call(argv_for(base, texts, tmp_path / "a", f"--iters 1 -c {file}")) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert match in error


def test_yaml_values_that_arguments_may_have(tmp_path):
    """--force of a file was ignored, and a size refused that the command line takes."""
    file = tmp_path / "c.yaml"
    file.write_text("force: true\nclear_cache_threshold: 4GB\n")
    args = parse("-c", str(file))
    assert args.force is True
    assert args.clear_cache_threshold == 4_000_000_000


def test_a_home_folder_of_yaml_is_found(base, texts, tmp_path, monkeypatch, capsys):
    """The adapters were written there, and the commands that were printed did not find them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("adapter_path: ~/runs/a\n")
    argv = argv_for(base, texts, "", f"--iters 1 --test -c {file}")
    at = argv.index("--adapter-path")
    assert call(argv[:at] + argv[at + 2 :]) == 0
    assert "--adapter-path '~/runs/a'" in capsys.readouterr().out
    load(base, adapter_path="~/runs/a")


def test_remote_code_may_be_trusted_in_yaml(tmp_path):
    """The option's own default hid the file's value."""
    file = tmp_path / "c.yaml"
    for value in (True, False):
        file.write_text(f"trust_remote_code: {str(value).lower()}\n")
        assert options("-c", str(file)).trust_remote_code is value


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("samplng: skips", "'samplng', which is none of"),
        ("- a", "must be a list of"),
        ("a: [", "cannot be read"),
        ("sampling: skip", "release, skips, cream, contiguous"),
        ("iters: many", "must be a whole number"),
        ("clear_cache_threshold: much", "must be a size such as 4GB, got 'much'"),
        ("scaling: clx", "--scaling must be one of none, linear, "),
        ("seed: -1", "--seed must be within 0..4294967295, got -1"),
        ("lora_parameters: {rank: 8, dropout: 0.0}", "must have a scale within"),
        ("lora_parameters: {rank: 100000000, scale: 1.0, dropout: 0.0}", "expected to need"),
        ("lora_parameters: {rank: 8, scale: 1.0, dropout: 0.5}\ngrad_checkpoint: true", "twice"),
        ("lr_schedule: {name: nothing, arguments: [1]}", "lr_schedule cannot be used"),
        ("optimizer: adamw\noptimizer_config: {adamw: {decay: 1}}", "optimizer_config of adamw"),
    ],
)
def test_bad_yaml_is_one_line(base, texts, tmp_path, text, match, capsys):
    """The key is named."""
    (tmp_path / "c.yaml").write_text(text)
    argv = argv_for(base, texts, tmp_path / "a", f"-c {tmp_path / 'c.yaml'}")
    assert call(argv) == 2
    assert match in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_batch_beyond_the_text_is_one_line(base, texts, tmp_path, capsys):
    """100,000,000 sequences took all memory."""
    (tmp_path / "c.yaml").write_text("batch_size: 100000000\n")
    argv = argv_for(base, texts, tmp_path / "a", f"-c {tmp_path / 'c.yaml'}")
    argv = [word for word in argv if word not in ("--batch-size", "2")]
    argv.insert(argv.index("--num-layers") + 1, "2")
    assert call(argv) == 2
    assert "expected to need" in capsys.readouterr().err.strip().splitlines()[-1]


def test_options_come_before_yaml_and_yaml_before_defaults(tmp_path):
    """As in mlx_lm.lora."""
    (tmp_path / "c.yaml").write_text("iters: 7\nbatch_size: 3\nlearning_rate: 1e-4\n")
    args = options("-c", str(tmp_path / "c.yaml"), "--iters", "5")
    assert (args.iters, args.batch_size, args.learning_rate, args.seed) == (5, 3, 1e-4, 0)
