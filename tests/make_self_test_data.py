"""Make the files in mlx_clex/golden, what `mlx_clex doctor --self-test` runs on.

    python -m tests.make_self_test_data

- clex_llama.safetensors is tests/golden/clex_llama, a two-layer model with the answers of the
  published code, cut down to the tokens of its first 100 positions: their rows of the embedding and
  of the output layer, and their columns of the expected logits. The layers are whole, so the cut
  changes no logit that is left. With them go the frequencies and one set of gradients.
- training_gradients.safetensors holds the gradients of a training step of this model with three
  methods, neither compiled nor checkpointed.
- perplexity.json holds the perplexities of the bundled models. Make it again with them.

The last two are of the machine that runs this.
"""

import json
from pathlib import Path
from typing import Any

import mlx_clex  # isort: skip  # noqa: F401 - before mlx.core: on Linux it looks for OpenBLAS

import mlx.core as mx
import torch
from mlx.utils import tree_flatten

from mlx_clex.self_test.running import PERPLEXITIES, pinned_perplexities
from mlx_clex.self_test.training import FILE, METHODS, step_of

SOURCE = Path(__file__).parent / "golden" / "clex_llama"
FOLDER = Path(__file__).parents[1] / "mlx_clex" / "golden"
MODEL = "clex_llama.safetensors"
LENGTH = 100  # tokens: past three steps of the scale, at 33, 65 and 97
START = 60  # tokens read in one pass before the rest is read one by one
NAMES = {
    "model.clex_layer.proj_func.ode_up_proj": "scaling.up_proj",
    "model.clex_layer.proj_func.ode_down_proj": "scaling.down_proj",
}


def write_model(target: Path) -> None:
    """Write the cut model and its answers."""
    golden = mx.load(str(SOURCE / "golden.safetensors"))
    assert isinstance(golden, dict)
    ids = [int(token) for token in golden["input_ids"][0, :LENGTH]]
    kept = sorted(set(ids))
    rows = mx.array(kept)

    tensors = {}
    for shard in sorted(SOURCE.glob("*.bin")):
        for name, tensor in torch.load(shard, weights_only=True).items():
            if name == "model.clex_layer.inv_freq":
                continue
            weight = mx.array(tensor.float().numpy())
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                weight = weight[rows]
            if name in NAMES:
                tensors[NAMES[name]] = weight
            else:
                tensors[name] = weight.astype(mx.bfloat16)

    stop = LENGTH - START + 1
    tensors["golden.tokens"] = mx.array([kept.index(token) for token in ids])
    tensors["golden.prefill_logits"] = golden[f"prefill_logits_{LENGTH}"][..., rows]
    tensors["golden.decode_logits"] = golden["decode_logits_60_134"][:, :stop, rows]
    tensors["golden.frequencies"] = golden["frequencies"]
    for part in ("sampled_positions", "cotangent", "grad_ode_up_proj", "grad_ode_down_proj"):
        tensors[f"golden.train_t5_{part}"] = golden[f"train_t5_len32_{part}"]
    tensors = {name: mx.contiguous(tensor) for name, tensor in tensors.items()}

    config = json.loads((SOURCE / "config.json").read_text())
    config = {key: config[key] for key in sorted(config) if key not in ("auto_map", "log_scale")}
    config["vocab_size"] = len(kept)
    mx.save_safetensors(str(target), tensors, metadata={"config": json.dumps(config)})


def gradients() -> dict[str, mx.array]:
    """Return the gradients of all methods by name, float32; neither compiled nor checkpointed."""
    found: dict[str, Any] = {}
    for method in METHODS:
        step, batch, draw = step_of(method)
        step.grad_checkpoint = False
        gradient_of, _ = step._apart
        inputs = step.inputs(batch, draw)
        _, found[method], _ = gradient_of(inputs, inputs.weights.sum(), None, True)
    return dict(tree_flatten(found))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    write_model(FOLDER / MODEL)
    mx.save_safetensors(str(FOLDER / FILE), gradients())
    text = json.dumps(pinned_perplexities(), indent=4) + "\n"
    (FOLDER / PERPLEXITIES).write_text(text)
    for file in sorted(FOLDER.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
