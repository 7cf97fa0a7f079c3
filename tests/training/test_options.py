"""Options of training: one table behind the command line, YAML files and the checks."""

import pytest
from mlx_lm.lora import CONFIG_DEFAULTS, build_parser

from mlx_clex import lora
from mlx_clex.errors import InputError
from mlx_clex.training.option_fields import options_of
from mlx_clex.training.options import TrainingOptions

from .commands import options, whole_parser

# The keys of mlx_lm/examples/lora_config.yaml.
EXAMPLE = """
model: mlx_model
train: true
fine_tune_type: lora
training_mode: normal
optimizer: adamw
data: /path/to/training/data
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: adapters
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: [self_attn.q_proj, self_attn.v_proj]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
hf_dataset:
  name: billsum
"""


def test_defaults_are_those_of_mlx_lm():
    """A default that mlx_lm.lora changes must be changed here too."""
    ours = {item.name: item.default for item in options_of(TrainingOptions)}
    theirs = {key: value for key, value in CONFIG_DEFAULTS.items() if key not in ("model", "data")}
    assert theirs.pop("config") is None
    # No default of ours: a scaling may allow less.
    assert theirs.pop("max_seq_length") == 2048
    assert {key: ours[key] for key in theirs} == theirs


def test_every_option_of_mlx_lm_is_taken():
    """A script for mlx_lm.lora must run with the other name in front."""
    ours, theirs = (
        {option for action in made._actions for option in action.option_strings}
        for made in (whole_parser(), build_parser())
    )
    assert theirs <= ours


def test_the_example_of_mlx_lm_is_taken(tmp_path):
    """Every key, and the values that its loader for YAML gives them."""
    (tmp_path / "c.yaml").write_text(EXAMPLE)
    found = options("-c", str(tmp_path / "c.yaml"))
    assert found.learning_rate == 1e-5
    assert found.lr_schedule["arguments"] == [1e-5, 1000, 1e-7]
    assert found.test_batches == 100


def test_every_option_tells_its_meaning_and_default():
    """--clear-cache-threshold printed ==SUPPRESS==, and some had no default."""
    for item in options_of(TrainingOptions):
        meaning, _, default = item.help.partition(" Default: ")
        assert meaning.endswith("."), item.name
        assert default not in ("", ".", "None."), item.name


def test_the_help_has_groups_keys_of_yaml_and_an_example(monkeypatch, capsys):
    """59 options in one list, and no word of the keys that only a YAML file has."""
    monkeypatch.setattr("sys.argv", ["mlx_clex lora", "--help"])
    with pytest.raises(SystemExit):
        lora.main()
    text = capsys.readouterr().out
    assert "SUPPRESS" not in text
    assert text.startswith("usage: mlx_clex lora [options]\n\n")
    titles = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles[0] == "options:"
    assert titles[-1] == "example:"
    assert len(titles) > 9
    for name in ("lora_parameters", "lr_schedule", "optimizer_config", "hf_dataset"):
        assert f"    {name}: " in text


def test_no_option_of_training_is_one_of_a_scaling():
    """Both are keys of the same YAML file."""
    names = [action.dest for action in whole_parser()._actions]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"iters": 0}, "--iters must be at least 1, got 0"),
        ({"iters": True}, "--iters must be a whole number, got True"),
        ({"iters": None}, "--iters must be a whole number, got None"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a finite number, got nan"),
        ({"learning_rate": float("inf")}, "--learning-rate must be a finite number, got inf"),
        ({"learning_rate": "1e-5"}, "--learning-rate must be a finite number, got '1e-5'"),
        ({"plain_share": 1}, "--plain-share must be at least 0 and below 1, got 1"),
        ({"sampling": "dense"}, "one of release, skips, cream, contiguous, pieces, got 'dense'"),
        ({"optimizer": "lion"}, "--optimizer must be one of adam, "),
        ({"num_layers": -2}, "--num-layers must be at least 1, or -1 for all, got -2"),
        ({"training_mode": "dpo"}, "training_mode must be one of normal, got 'dpo'"),
        ({"warmup": 1, "lr_schedule": {"name": "x"}}, "leave them out"),
    ],
)
def test_values_that_cannot_be_are_refused(value, match):
    """Wherever they come from: no option has a check of its own elsewhere."""
    with pytest.raises(InputError) as caught:
        TrainingOptions(**value)
    assert match in str(caught.value)


def test_memory_sizes_are_read_or_refused(capsys):
    """mlx_lm's reader of sizes ends in a KeyError."""
    assert options("--clear-cache-threshold", "1.5GB").clear_cache_threshold == 1_500_000_000
    for text in ("4TB", "much", ""):
        with pytest.raises(SystemExit):
            options("--clear-cache-threshold", text)
        assert "must be a size such as 4GB" in capsys.readouterr().err


def test_a_resumed_run_may_change_what_decides_no_weight():
    """A longer run is the same run, unless its cosine is stretched."""
    assert "iters" not in TrainingOptions(iters=5).lasting()
    assert TrainingOptions(iters=5, cosine=True).lasting()["iters"] == 5
    lasting = TrainingOptions().lasting()
    assert {"seed", "batch_size", "learning_rate", "max_seq_length", "sampling"} <= lasting.keys()
    assert not {"keep", "resume", "grad_checkpoint", "adapter_path"} & lasting.keys()
