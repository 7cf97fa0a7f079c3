"""One command trains the weights, then the network, and goes on across the boundary."""

import itertools
import json
import shutil

import mlx.core as mx
import pytest

from mlx_clex import load
from mlx_clex.diagnosis.machine import described
from mlx_clex.training.best import Best
from mlx_clex.training.loop import Run
from mlx_clex.training.recipe import stages

from .commands import argv_for, arrays, call, equal, options

pytestmark = pytest.mark.usefixtures("eager")
TWO_STAGE = (
    "--recipe two-stage --iters 2 --stage-2-iters 8 --stage-2-length 128 --num-layers 1 "
    "--train-norms-and-embeddings --save-every 4"
)


def network(adapters):
    return mx.load(str(adapters / "scaling.safetensors"))["scaling.down_proj"]


def test_stage_2_trains_the_network_alone(base, texts, tmp_path, monkeypatch, capsys):
    """The weights stay those of stage 1; the network that is kept is the best at long lengths."""
    plain, falling = Best.consider, itertools.count(0, -1)
    # As if each validation were better than the one before.
    monkeypatch.setattr(Best, "consider", lambda *args: plain(*args[:-1], next(falling)))
    adapters = tmp_path / "a"
    assert call(argv_for(base, texts, adapters, TWO_STAGE)) == 0
    before, after = arrays(adapters / "stage-1"), arrays(adapters)
    start = load(base)[0].scaling.down_proj
    assert "scaling.safetensors" not in before
    assert not mx.array_equal(after.pop("scaling.safetensors")["scaling.down_proj"], start)
    assert equal(before, after)
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 1)
    model = load(base, adapter_path=adapters)[0]
    assert mx.array_equal(model.scaling.down_proj, network(adapters))
    printed = capsys.readouterr().out
    assert "tokens:      128 an iteration (1 x 128)" in printed

    # As if each were worse: the start is kept.
    rising = itertools.count()
    monkeypatch.setattr(Best, "consider", lambda *args: plain(*args[:-1], next(rising)))
    assert call(argv_for(base, texts, tmp_path / "b", TWO_STAGE)) == 0
    assert mx.array_equal(network(tmp_path / "b"), start)


def test_a_stopped_recipe_goes_on(base, texts, tmp_path, monkeypatch):
    """Stopped in either stage, it ends with the weights of a run that was never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(argv_for(base, texts, whole, TWO_STAGE)) == 0
    plain = Run._iterate
    for stage, iteration in (("stage-1", 1), ("parts", 5)):

        def stop(self, *args, stage=stage, iteration=iteration):
            update = plain(self, *args)
            if self.checkpoints.folder.name == stage and self.progress.iteration == iteration:
                raise KeyboardInterrupt
            return update

        monkeypatch.setattr(Run, "_iterate", stop)
        assert call([*argv_for(base, texts, parts, TWO_STAGE), "--resume"]) == 130
    monkeypatch.setattr(Run, "_iterate", plain)
    assert call([*argv_for(base, texts, parts, TWO_STAGE), "--resume"]) == 0
    assert equal(arrays(whole), arrays(parts))


def test_stage_2_is_of_the_weights_that_stage_1_ended_with(base, texts, tmp_path, capsys):
    """More iterations of stage 1 changed nothing of the result."""
    argv = [*argv_for(base, texts, tmp_path / "a", TWO_STAGE), "--resume"]
    assert call(argv) == 0
    capsys.readouterr()
    assert call([*argv, "--iters", "4"]) == 2
    assert "the adapters below was" in capsys.readouterr().err


def test_the_test_part_is_that_of_the_command(base, texts, tmp_path, capsys):
    """It was looked for after stage 1, and measured in the rows of stage 2."""
    assert call([*argv_for(base, texts, tmp_path / "a", TWO_STAGE), "--test"]) == 0
    loss = capsys.readouterr().out.split("Test loss ")[1]
    argv = argv_for(base, texts, tmp_path / "a", "--test")
    argv.remove("--train")
    assert call(argv) == 0
    assert capsys.readouterr().out.split("Test loss ")[1] == loss.split("\n")[0] + "\n"
    shutil.copytree(texts, tmp_path / "texts", ignore=shutil.ignore_patterns("test"))
    assert call([*argv_for(base, tmp_path / "texts", tmp_path / "b", TWO_STAGE), "--test"]) == 2
    assert "has no test part" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("more", "rate"), [("", 1e-5), ("--scaling-learning-rate 1e-3", 1e-3)])
def test_stage_2_has_the_learning_rate_of_the_scaling(more, rate):
    """A given one was ignored."""
    first, second = stages(options("--train", *TWO_STAGE.split(), *more.split()))
    assert (first.scaling_learning_rate, second.learning_rate) == (0, rate)


@pytest.mark.parametrize(("processes", "accumulated"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_every_process_has_rows_of_stage_2(processes, accumulated):
    """A row cannot be shared, so stage 2 was refused after stage 1 had trained."""
    _, second = stages(options("--train", *TWO_STAGE.split()), processes)
    assert (second.batch_size, second.grad_accumulation_steps) == (processes, accumulated)


def test_rows_of_stage_2_that_do_not_fit_are_refused_first(
    base, texts, tmp_path, monkeypatch, capsys
):
    """Stage 2 ran out of memory after stage 1 had trained for hours."""
    assert call(argv_for(base, texts, tmp_path / "a", TWO_STAGE)) == 0
    said = "Stage 2 on 1 x 128 tokens (--stage-2-length) is expected to need"
    assert said in capsys.readouterr().err
    machine = described(1.3e6, "cpu")
    monkeypatch.setattr("mlx_clex.commands.memory_check.this_machine", lambda: machine)
    argv = argv_for(base, texts, tmp_path / "b", f"{TWO_STAGE} --max-seq-length 32 --batch-size 1")
    assert call(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "128 tokens do not fit" in error
    assert not (tmp_path / "b" / "stage-1" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("model", "more", "match"),
    [
        ("gene_llama", "", "and gene has none. Use clex"),
        ("clex_llama", "--stage-2-length 40", "--stage-2-length 40 must be at least 64 tokens"),
        ("clex_llama", "--stage-2-length 100000", "the longest training text"),
        ("clex_llama", "--sampling pieces", "Use --scale-draw fixed, got uniform"),
        ("clex_llama", "--recipe single --keep-best", "--keep-best needs --eval-lengths beyond"),
    ],
)
def test_what_stage_2_cannot_do_is_refused_first(
    converted, texts, tmp_path, capsys, model, more, match
):
    """The message comes before stage 1 has trained for hours."""
    more = f"--iters 2 --recipe two-stage {more}"
    assert call(argv_for(converted(model), texts, tmp_path / "a", more)) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
