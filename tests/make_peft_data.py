"""Make tests/data/peft, adapters that PEFT wrote with the answers that it gave.

    pip install peft accelerate
    python -m tests.make_peft_data

Each folder has adapter_config.json and adapter_model.safetensors as `save_pretrained` wrote
them, and answers.json with a few logits. `base_folder` makes the base model, which is not stored.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TARGET = Path(__file__).parent / "data" / "peft"
IDS = [5, 3, 47, 12, 60, 8, 31]
SEEN = (2, 7, 40)  # tokens whose logits are stored, at every position
_LAYERS, _WIDTH, _HEADS, _KEY_HEADS, _INNER, _VOCABULARY = 2, 16, 4, 2, 24, 64

# What `LoraConfig` gets; the rest of its settings are its defaults.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 6},
    "rslora": {
        "target_modules": ["q_proj", "o_proj"],
        "use_rslora": True,
        "rank_pattern": {"o_proj": 4},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "layers.0.self_attn.o_proj": 1},
    },
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "whole": {
        "target_modules": ["k_proj", "embed_tokens"],
        "modules_to_save": ["lm_head", "input_layernorm"],
        "bias": "all",
    },
}


def base_folder(folder: Path) -> Path:
    """Write a random two-layer Qwen 2, whose q, k and v have biases, as transformers does."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.3).astype(np.float32)

    head = _WIDTH // _HEADS
    tensors = {
        "model.embed_tokens.weight": normal(_VOCABULARY, _WIDTH),
        "lm_head.weight": normal(_VOCABULARY, _WIDTH),
        "model.norm.weight": 1 + normal(_WIDTH),
    }
    for layer in range(_LAYERS):
        at = f"model.layers.{layer}"
        for name, heads in (("q", _HEADS), ("k", _KEY_HEADS), ("v", _KEY_HEADS)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = normal(heads * head, _WIDTH)
            tensors[f"{at}.self_attn.{name}_proj.bias"] = normal(heads * head)
        tensors[f"{at}.self_attn.o_proj.weight"] = normal(_WIDTH, _WIDTH)
        tensors[f"{at}.mlp.gate_proj.weight"] = normal(_INNER, _WIDTH)
        tensors[f"{at}.mlp.up_proj.weight"] = normal(_INNER, _WIDTH)
        tensors[f"{at}.mlp.down_proj.weight"] = normal(_WIDTH, _INNER)
        tensors[f"{at}.input_layernorm.weight"] = 1 + normal(_WIDTH)
        tensors[f"{at}.post_attention_layernorm.weight"] = 1 + normal(_WIDTH)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_HEADS,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    """Write every folder anew."""
    import tempfile

    import peft  # type: ignore[import-not-found]
    import torch
    import transformers

    shutil.rmtree(TARGET, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        base = base_folder(Path(scratch) / "base")
        for kind, settings in KINDS.items():
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings)
            model = peft.get_peft_model(model, config)
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn(parameter.shape) * 0.3
            model.eval()
            model.save_pretrained(TARGET / kind)
            (TARGET / kind / "README.md").unlink()
            again = peft.PeftModel.from_pretrained(
                transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                TARGET / kind,
            ).eval()
            with torch.no_grad():
                logits, loaded = (m(torch.tensor([IDS])).logits[0] for m in (model, again))
            assert torch.allclose(logits, loaded, atol=1e-5), "what was saved is what was trained"
            path = TARGET / kind / "adapter_config.json"
            saved = json.loads(path.read_text()) | {"base_model_name_or_path": "base"}
            path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
            answers = [[round(x, 5) for x in row] for row in loaded[:, list(SEEN)].tolist()]
            (TARGET / kind / "answers.json").write_text(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
