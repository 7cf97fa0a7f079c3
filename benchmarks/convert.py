"""Measure memory and speed of a conversion on a large random checkpoint.

    python -m benchmarks.convert [--quick] [--folder FOLDER]

The benchmark writes a random LLaMA checkpoint of 3 GB in six bfloat16 shards. It converts the
checkpoint unchanged, to float16 and to 4 bits, each in its own process, and reports the peak
resident memory of the process minus that of its imports. It needs disk space of twice the
checkpoint's size and deletes its files at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

SHARDS = 6
TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "clex_llama"  # vocabulary 512
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

# The child process converts; it prints status, memory before and peak memory (bytes), seconds.
CHILD = """
import json, resource, sys, time
import mlx_clex.convert.__main__ as command

def peak():
    try:  # on Linux ru_maxrss includes the parent's peak
        status = open("/proc/self/status").read()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

imports, start = peak(), time.perf_counter()
status = command.main()
seconds = time.perf_counter() - start
print(json.dumps([status, imports, peak(), seconds]))
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name, in the order of the file."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    block: dict[str, tuple[int, ...]] = {}
    block |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    block |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    block |= {"mlp.down_proj": (hidden, inner)}
    block |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    table: dict[str, tuple[int, ...]] = {}
    table |= {"model.embed_tokens": (CONFIG["vocab_size"], hidden)}
    for layer in range(layers):
        table |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    table |= {"model.norm": (hidden,), "lm_head": (CONFIG["vocab_size"], hidden)}
    return {f"{name}.weight": shape for name, shape in table.items()}


def write_checkpoint(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write the checkpoint; return its size and the size of its largest shard, in bytes."""
    a_layer = sum(int(np.prod(s)) for n, s in shapes(1).items() if "layers" in n)
    layers = max(SHARDS, round(gigabytes * 1e9 / 2 / a_layer))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    for source in TOKENIZER.glob("*token*"):
        shutil.copy(source, folder)
    table = shapes(layers)
    names = list(table)
    rng = np.random.default_rng(0)
    weight_map = {}
    sizes = []
    for shard, part in enumerate(np.array_split(np.arange(len(names)), SHARDS), start=1):
        file = f"model-{shard:05}-of-{SHARDS:05}.safetensors"
        tensors = {}
        for name in (names[i] for i in part):
            # Random bits of bfloat16 numbers between -2 and 2; faster than drawing numbers.
            bits = rng.integers(0, 1 << 16, table[name], dtype=np.uint16) & 0xBFFF
            tensors[name] = mx.array(bits).view(mx.bfloat16)
            weight_map[name] = file
        mx.save_safetensors(str(folder / file), tensors, metadata={"format": "pt"})
        sizes.append((folder / file).stat().st_size)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes), max(sizes)


def convert(source: Path, target: Path, options: list[str]) -> tuple[float, float]:
    """Convert in a child process; return (peak minus imports in bytes, seconds)."""
    arguments = ["--hf-path", str(source), "--mlx-path", str(target), "--scaling", "clex"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments, *options],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"The conversion failed:\n{done.stderr}")
    status, imports, peak, seconds = json.loads(done.stdout.splitlines()[-1])
    if status:
        sys.exit(f"The conversion failed:\n{done.stderr}")
    return peak - imports, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--folder", default=None, help="parent of the temporary folder")
    parser.add_argument("--quick", action="store_true", help="0.6 GB")
    args = parser.parse_args()
    gigabytes = 0.6 if args.quick else args.gigabytes

    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source = Path(scratch) / "source"
        start = time.perf_counter()
        size, largest = write_checkpoint(source, gigabytes)
        allowed = (1.5 * largest + 100e6) / 1e6
        print(
            f"Checkpoint of {size / 1e9:.2f} GB, largest shard {largest / 1e6:.0f} MB, written "
            f"in {time.perf_counter() - start:.0f} s.\n"
        )
        print("| conversion | seconds | MB/s read | memory above imports | allowed |")
        print("|---|---|---|---|---|")
        for name, options in {
            "unchanged": [],
            "float16": ["--dtype", "float16"],
            "4 bits": ["-q", "--q-bits", "4"],
        }.items():
            target = Path(scratch) / "target"
            memory, seconds = convert(source, target, options)
            print(
                f"| {name} | {seconds:.1f} | {size / 1e6 / seconds:.0f} "
                f"| {memory / 1e6:.0f} MB | {allowed:.0f} MB |",
                flush=True,
            )
            shutil.rmtree(target)


if __name__ == "__main__":
    main()
