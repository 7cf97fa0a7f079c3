"""Predicted memory must agree with MLX's, and with its rules for attention."""

import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_clex.diagnosis import machine as machines
from mlx_clex.diagnosis.memory import (
    Reading,
    Training,
    decoding,
    fused,
    longest,
    peak,
    reading,
    training,
    verdict,
)
from mlx_clex.diagnosis.sizes import Caches, Sizes, sizes_of
from mlx_clex.diagnosis.source import Source, find_source

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "rope_scaling": {"type": "clex", "max_factor": 16},
}


def seven_billion(q_bits=None, **changes):
    """Return the sizes of a LLaMA 7B with CLEX that has no weights."""
    return sizes_of(Source("7b", LLAMA_7B | changes, None), q_bits)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="fitted to the CPU")
def test_the_peak_is_predicted_within_ten_per_cent():
    """A run that was said to fit ended the machine.

    In a process of its own: `lora` changes the order in which MLX computes, before its first array.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ratios = [float(row.split("|")[-2]) for row in done.stdout.splitlines()[2:]]
    assert len(ratios) == 12
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios), done.stdout


def test_sizes_come_from_shapes_alone():
    """Weights, caches and widths of a 7B, without a byte of memory for them."""
    before = mx.get_active_memory()
    sizes = seven_billion()
    assert mx.get_active_memory() - before < 1e6
    assert sizes.weights == pytest.approx(2 * 6.74e9, rel=0.01)
    assert (sizes.layers, sizes.hidden, sizes.queries, sizes.inner) == (32, 4096, 4096, 11008)
    assert sizes.caches == Caches(growing=32 * 2 * 4096, largest=2 * 4096)
    assert sizes.reach == 65536
    assert seven_billion(q_bits=4).weights == pytest.approx(6.74e9 * 4.5 / 8, rel=0.01)


def test_a_loaded_model_has_the_sizes_of_its_folder():
    """The header of its tensors, and the float32 that bundled models are loaded in."""
    sizes = sizes_of(find_source("bundled:clex"))
    assert sizes.itemsize == 4
    assert sizes.weights == pytest.approx(4 * 8.9e5, rel=0.05)


@pytest.mark.parametrize(
    ("back_end", "tokens", "head", "itemsize", "is_training", "expected"),
    [
        ("cpu", 1, 128, 2, False, False),
        ("metal", 512, 128, 2, False, True),
        ("metal", 512, 256, 2, False, False),
        ("metal", 8, 48, 2, False, True),
        ("metal", 512, 48, 2, True, True),
        ("cuda", 512, 128, 2, False, True),
        ("cuda", 512, 128, 4, False, False),
        ("cuda", 512, 192, 2, False, False),
    ],
)
def test_attention_is_fused_where_mlx_fuses_it(
    back_end, tokens, head, itemsize, is_training, expected
):
    """The scores of all heads are the largest array where it is not."""
    sizes = replace(seven_billion(), head_dim=head, itemsize=itemsize)
    assert fused(sizes, tokens, back_end, training=is_training) == expected


def test_what_saves_memory_is_predicted_to_save_it():
    """Each option of the advice must do something."""
    sizes = seven_billion()
    read = Reading(length=16384)
    for back_end in ("cpu", "metal", "cuda"):
        whole = peak(reading(sizes, read, back_end))
        assert peak(reading(sizes, replace(read, step=512), back_end)) < whole
        assert peak(reading(sizes, replace(read, kv_bits=4), back_end)) < whole - 5e9
        assert peak(decoding(sizes, read, back_end)) < whole
        train = Training(length=2048)
        steps = peak(training(sizes, train, back_end))
        assert peak(training(sizes, replace(train, grad_checkpoint=True), back_end)) < steps
        assert peak(training(sizes, replace(train, full=True), back_end)) > steps + 6e9 * 4
        fewer = replace(train, num_layers=8)
        saved = steps - peak(training(sizes, fewer, back_end))
        assert saved > 0.7 * (steps - sizes.weights)  # three quarters of the layers
        assert peak(training(sizes, replace(fewer, learns=True), back_end)) > 0.9 * steps


def test_a_cache_is_plain_until_it_is_quantised():
    """4,000 tokens with --kv-bits 4 were predicted in 4 bits, and are read in 16."""
    sizes = seven_billion()
    plain, read = Reading(length=4000), Reading(length=4000, kv_bits=4)
    for of in (reading, decoding):
        assert of(sizes, read, "metal") == of(sizes, plain, "metal")
    # Passes of 2,048 tokens: the one that ends at 6,144 is the first past 5,000.
    most = peak(reading(sizes, Reading(length=6144), "metal"))
    assert peak(reading(sizes, replace(read, length=7000), "metal")) == most
    assert peak(reading(sizes, replace(read, length=7000, kv_start=0), "metal")) < most - 1e9


def test_groups_of_a_quantised_cache_are_counted():
    """A scale and a bias for each group, in the type of the model."""
    caches = Caches(growing=1024, largest=256)
    assert caches.nbytes(1536, 4, 8, 64) == 1_769_472  # of the bundled GeNE, by MLX
    assert caches.nbytes(1536, 4, 8, 32) == 1_966_080
    read = Reading(length=16384, kv_bits=4, kv_start=0)
    in_groups = [
        reading(seven_billion(), replace(read, kv_group=group), "metal")["KV cache"]
        for group in (32, 64)
    ]
    assert in_groups[0] / in_groups[1] == pytest.approx(5 / 4.5)


def test_long_passes_are_read_in_parts():
    """At 65,536 tokens the scores were predicted at 2.1 times what a pass in parts has."""
    sizes = replace(seven_billion(), itemsize=4)
    most = 2**31 * 4 + 2**31 / 32  # of 32 heads, with a mask of one byte for all heads
    for length, scores in ((16384, most / 2), (32768, most), (65536, most), (131072, most)):
        assert reading(sizes, Reading(length=length), "cpu")["attention scores"] == scores
    # Just past a bound, passes are shorter than before it.
    assert reading(sizes, Reading(length=33000), "cpu")["attention scores"] == most
    stock = replace(sizes, scaled=False)
    assert reading(stock, Reading(length=65536), "cpu")["attention scores"] == 2 * most


def test_the_longest_length_is_the_last_that_fits():
    """One token more must not fit; no length at all is 0."""
    sizes = seven_billion()

    def parts(length):
        return reading(sizes, Reading(length=length), "metal")

    found = longest(parts, 30e9)
    assert peak(parts(found)) <= 30e9 < peak(parts(found + 1))
    assert longest(parts, 1e9) == 0
    assert longest(parts, 30e9, limit=100) == 100


def test_a_machine_is_described_by_its_memory():
    """macOS gives the GPU two thirds of a small machine and three quarters of a large one."""
    small, large = machines.described(16e9, "metal"), machines.described(64e9, "metal")
    assert (small.usable, large.usable) == (pytest.approx(16e9 * 2 / 3), 48e9)
    assert [verdict(n, small) for n in (10e9, 20e9, 21e9)] == ["fits", "tight", "too large"]
    here = machines.this_machine()
    assert 0.5e9 < here.usable <= here.memory


def test_sizes_does_not_need_a_rope():
    """Only the number of heads must be in the config."""
    assert isinstance(seven_billion(rope_scaling=None), Sizes)
