"""No collective is part of a computation on the GPU: macOS ends one that waits for a peer."""

from pathlib import Path
from types import MethodType, SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_clex.model.sharding import shared_seed
from mlx_clex.training.step import TrainingStep

from .test_step import batch_of, drawn, make_step

# What `average_gradients` itself does before a collective, on the CPU.
PACKING = {"Reshape", "Flatten", "Concatenate"}


def operations(arrays, path: Path) -> set[str]:
    """The operations that have to run before these arrays are there."""
    mx.export_to_dot(str(path), *arrays)
    return {
        line.split('label ="')[1].split('"')[0]
        for line in path.read_text().splitlines()
        if 'label ="' in line and "shape=rectangle" in line
    }


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Return a group of two, and what waited to be computed at each collective."""
    waiting: list[set[str]] = []

    def all_sum(value, *, group, stream):
        assert stream in (mx.cpu, mx.default_stream(mx.cpu))
        waiting.append(operations([value], tmp_path / "graph.dot"))
        return value + value  # the other process has the same rows

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    return SimpleNamespace(size=lambda: 2, rank=lambda: 0), waiting


def test_a_computed_array_has_no_operations(tmp_path):
    """The test below sees an evaluation as the end of a graph."""
    value = mx.exp(mx.array([1.0]))
    assert operations([value], tmp_path / "graph.dot") == {"Exp"}
    mx.eval(value)
    assert operations([value], tmp_path / "graph.dot") == set()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_all_is_computed_before_and_after_each_collective(two, micro_batches, tmp_path):
    """Gradient, sums and update were one command buffer, which waited for the slower process."""
    group, waiting = two
    step = make_step(lora=True, lr=0.1, max_grad_norm=1.0, group=group)
    gradient_of, update_with = step._apart
    summed: list[set[str]] = []

    def update(gradient):
        summed.append(
            operations([value for _, value in tree_flatten(gradient)], tmp_path / "graph.dot")
        )
        return update_with(gradient)

    step._apart = gradient_of, update
    for number in range(1, micro_batches + 1):
        step(batch_of(seed=number), drawn(3.0), update=number == micro_batches)

    assert len(waiting) == 2 * micro_batches + 1  # tokens and loss of each; one gradient
    assert set().union(*waiting) <= PACKING
    assert summed == [set()]
    assert step.traces == micro_batches


def test_the_sum_of_two_equal_processes_is_one_step(two):
    """Every token of all processes has the same weight, however the step is cut."""
    group, _ = two
    together, alone = make_step(lr=0.1, group=group), make_step(lr=0.1)
    for step in (together, alone):
        for number, update in ((1, False), (2, True)):
            step(batch_of(seed=number), drawn(3.0), update=update)
    ours = dict(tree_flatten(together.model.parameters()))
    for name, value in tree_flatten(alone.model.parameters()):
        assert mx.abs(value - ours[name]).max().item() < 1e-6, name


def test_one_process_compiles_the_whole_step():
    """Cut in two, the gradients of all layers would be in memory at once."""
    step = make_step(lr=0.1)
    assert isinstance(step, TrainingStep)
    step(batch_of(), drawn(2.0))
    step(batch_of(), drawn(3.0))
    assert step.traces == 1
    # A compiled function says that it is of the class of what it compiles.
    assert type(step._compiled) is not MethodType, "the step runs uncompiled"


def test_the_shared_seed_is_drawn_before_it_is_sent(two):
    """Drawing on the GPU and sending were one computation."""
    group, waiting = two
    shared_seed(group)
    assert waiting == [set()]
