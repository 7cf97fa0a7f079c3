"""What llama.cpp stores differently from Hugging Face, by architecture.

Not covered: other architectures, and experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# GGUF name -> Hugging Face name, for every architecture here.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    r"blk\.(\d+)\.attn_norm": "model.layers.{}.input_layernorm",
    r"blk\.(\d+)\.ffn_norm": "model.layers.{}.post_attention_layernorm",
    r"blk\.(\d+)\.attn_q": "model.layers.{}.self_attn.q_proj",
    r"blk\.(\d+)\.attn_k": "model.layers.{}.self_attn.k_proj",
    r"blk\.(\d+)\.attn_v": "model.layers.{}.self_attn.v_proj",
    r"blk\.(\d+)\.attn_output": "model.layers.{}.self_attn.o_proj",
    r"blk\.(\d+)\.ffn_gate": "model.layers.{}.mlp.gate_proj",
    r"blk\.(\d+)\.ffn_up": "model.layers.{}.mlp.up_proj",
    r"blk\.(\d+)\.ffn_down": "model.layers.{}.mlp.down_proj",
}
_HEAD_NORMS = {
    r"blk\.(\d+)\.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    r"blk\.(\d+)\.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_GEMMA_NORMS = {
    r"blk\.(\d+)\.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    r"blk\.(\d+)\.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    r"blk\.(\d+)\.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of .gguf files, and the model type that it becomes."""

    model_type: str
    model_class: str  # of transformers
    names: Mapping[str, str] = field(default_factory=dict)  # beside `_NAMES`, or in their place
    paired: bool = False  # rows of q and k are stored as neighbouring pairs, not as halves
    norm_shift: float = 0.0  # what the file's norm weights have more than Hugging Face's
    constants: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}

    @property
    def table(self) -> dict[str, str]:
        """GGUF name -> Hugging Face name, both without `.weight` or `.bias`."""
        return {**_NAMES, **self.names}


def _gemma3(config: dict[str, Any]) -> dict[str, Any]:
    """Return settings that llama.cpp keeps in its code.

    Source: transformers, `Gemma3TextConfig`; llama.cpp, src/models/gemma3.cpp, for the 27B model.
    """
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    return {
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": config["hidden_size"] // heads
        if layers == 62
        else config["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(model_type="llama", model_class="LlamaForCausalLM", paired=True),
    "qwen2": Family(model_type="qwen2", model_class="Qwen2ForCausalLM"),
    "qwen3": Family(model_type="qwen3", model_class="Qwen3ForCausalLM", names=_HEAD_NORMS),
    "gemma3": Family(
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        names=_HEAD_NORMS | _GEMMA_NORMS,
        norm_shift=1.0,
        constants=_gemma3,
    ),
}


def llama3_rope(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Return the rope_scaling entry of a Llama 3 from the divisors of its frequencies.

    Args:
        divisors: the tensor rope_freqs.weight, (D/2,): base frequency / frequency.
        theta: rope_theta.

    Returns:
        The entry with the published bounds of Llama 3.1 to 3.3, or None if they do not give
        these divisors.

    Source: transformers, modeling_rope_utils.py, the type `llama3`.
    """
    factor, low, high, length = float(divisors.max()), 1.0, 4.0, 8192
    turns = length * theta ** -(np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
