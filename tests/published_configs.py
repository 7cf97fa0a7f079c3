"""Published checkpoints by their config.json, scaled down to models of about 1 M parameters.

`tests/data/configs.json` has the published facts, the copy each was read from, and the
fields that no copy confirmed (`unverified`). Beside a config stands what fails today:
`mlx_lm_cannot` (build the model), `tokenizer_cannot` (transformers stops at the config of a
family that it does not know), `rotations_differ` (mlx-lm's rotation is not transformers'),
`not_compared`. Renew the last two with `python -m tests.published_configs`.

Not covered: quantised weights. A scaled config leaves `quantization_config` out, because it
describes tensors that the random weights are not
(`test_quantised_configurations.py` has some).
"""

import json
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import _get_classes as get_stock_classes
from mlx_lm.utils import save_model

FILE = Path(__file__).parent / "data" / "configs.json"
CONFIGS: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
TOKENIZER = Path(__file__).parent / "golden" / "clex_llama"

VOCABULARY = 512  # tokens of the golden tokenizer
LENGTH = 16  # tokens, shorter than every published length

# What each width becomes. A smaller published value stays.
_WIDTHS = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("intermediate_size", "shared_intermediate_size", "block_ff_dim"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "n_group"), 2),
    "moe_num_experts": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 5,
    **dict.fromkeys(("topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_shared_expert"), 1),
}
_HIDDEN = ("hidden_size", "n_embd")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_HEADS = ("num_attention_heads", "n_head")
_LATENT = "qk_rope_head_dim"  # a family whose attention is DeepSeek's
_ONE_LAYER = ("gptj", "gpt_neox")  # their MLP has four times the width, whatever the config says


def published(name: str) -> dict[str, Any]:
    """Return the config.json of a checkpoint, as published."""
    return json.loads(json.dumps(CONFIGS[name]["config"]))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the text model."""
    return config.get("text_config", config)


def scaled(name: str) -> dict[str, Any]:
    """Return a config with few layers, narrow widths, and the published rotation.

    Rotated dimensions, theta, factors, lengths, windows and one period of the layer
    pattern are as published. Heads that share keys still do.
    """
    config = published(name)
    config.pop("quantization_config", None)
    text = text_config(config)
    _fewer_layers(text)
    _narrower(text)
    for key, width in _WIDTHS.items():
        value = text.get(key)
        if isinstance(value, list):  # one a layer
            text[key] = [min(each, width) for each in value]
        elif value is not None:
            text[key] = min(value, width)
    if text is not config:
        config["vocab_size"] = text["vocab_size"] = VOCABULARY
    return config | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _fewer_layers(text: dict[str, Any]) -> None:
    """Keep one period of the layer pattern, and two layers at least."""
    key = _first(text, _LAYERS)
    types = text.get("layer_types", [])
    layers = max([2, *(types.index(kind) + 1 for kind in set(types))])
    for period in ("no_rope_layer_interval", "full_attention_interval"):
        layers = max(layers, text.get(period, 0))
    if text["model_type"] == "gemma3_text":
        layers = text.get("sliding_window_pattern", 6)
    if text["model_type"] == "gemma4_text":
        layers *= 2  # the second half reads the keys of the first
    if text["model_type"] in _ONE_LAYER:
        layers = 1
    for name, value in text.items():
        if isinstance(value, list) and len(value) == text[key]:
            text[name] = value[:layers]
    text[key] = layers
    if "moe_layer_end_index" in text:
        text["moe_layer_end_index"] = layers - 1


def _narrower(text: dict[str, Any]) -> None:
    """Cut heads and hidden size; the dimensions of a head stay."""
    width, count = _first(text, _HIDDEN), _first(text, _HEADS)
    published_heads = text.get(count, 8)  # Gemma 3's default, where the key is absent
    head_dim = text.get("head_dim", text[width] // published_heads)
    heads = 1 if text["model_type"] == "gptj" else 2
    # Some families want heads * head_dim = hidden size; the others may have fewer.
    hidden = heads * head_dim
    if hidden > 256 or head_dim * published_heads != text[width]:
        hidden = 64
    if _LATENT in text or text.get("position_embedding_type") == "nope":
        hidden = 64  # no rotated dimension depends on it
    if text["model_type"] == "gemma4_text":
        hidden = 32  # a head of a full layer has 512 dimensions
    if "num_key_value_heads" in text:
        shared = text["num_key_value_heads"] < published_heads
        text["num_key_value_heads"] = 1 if shared else heads
    elif text["model_type"] == "gemma3_text":
        text["num_key_value_heads"] = 1
    if text.get("dim_model_base"):
        text["dim_model_base"] = text["dim_model_base"] * hidden // text[width]
    if text.get("block_dim"):
        text["block_dim"] = hidden
    if "mamba_d_ssm" in text:
        text |= {"mamba_n_heads": 4, "mamba_d_ssm": 64}
    elif "mamba_n_heads" in text:  # they and their width make twice the hidden size
        text["mamba_n_heads"] = 2 * hidden // 16
    text |= {width: hidden, count: heads}


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in text), names[0])


def build(config: dict[str, Any]) -> Any:
    """Return mlx-lm's own model of a config, with random weights in float32."""
    model_class, args_class = get_stock_classes(config)
    mx.random.seed(1)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    model.eval()
    return model


def tiny_folder(name: str, target: Path) -> Path:
    """Write the scaled checkpoint: config.json, model.safetensors and a tokenizer of 512 tokens."""
    config = scaled(name)
    save_model(target, build(config))
    (target / "config.json").write_text(json.dumps(config, indent=1))
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / file, target)
    return target


# Rotations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """What a rope does near position 0 when the text has a given length."""

    inv_freq: np.ndarray  # radians per token, (D/2,)
    gain: float  # on the rotated part of queries and of keys, no unit
    error: float = 1e-3  # of the measured frequencies, relative

    def differs(self, other: "Rotation") -> dict[str, Any]:
        """Return the figures in which two rotations differ, rounded; empty if they agree."""
        figures: dict[str, Any] = {}
        if self.inv_freq.shape != other.inv_freq.shape:
            return {"pairs": [self.inv_freq.size, other.inv_freq.size]}
        turning = (self.inv_freq != 0) | (other.inv_freq != 0)  # Gemma 4 has pairs that stand
        ours, theirs = self.inv_freq[turning], other.inv_freq[turning]
        largest = np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-30))
        if largest > max(self.error, other.error):
            figures["frequencies"] = float(f"{largest:.2g}")
        if abs(self.gain / other.gain - 1) > 1e-4:
            figures["gain"] = [float(f"{self.gain:.4g}"), float(f"{other.gain:.4g}")]
        return figures


def stock_rotations(name: str, model: Any, length: int) -> dict[str, Rotation]:
    """Return mlx-lm's rotations in a text of `length` tokens, by the kind of layer."""
    found: dict[str, Rotation] = {}
    for layer, kind in zip(model.layers, _kinds(text_config(scaled(name))), strict=True):
        for path, module in layer.named_modules():
            if path.rpartition(".")[2] == "rope" and _dims(module):
                found.setdefault(kind, _measured(module, length))
    return found


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _kinds(text: Mapping[str, Any]) -> list[str]:
    """Return the kind of each layer, as transformers names it."""
    layers = text[_first(text, _LAYERS)]
    if _SLIDING in text.get("layer_types", []):
        return text["layer_types"]
    if text["model_type"] == "gemma3_text":  # older than layer_types
        return [_SLIDING] * (layers - 1) + [_FULL]
    return [_FULL] * layers


def _measured(rope: Any, length: int) -> Rotation:
    """Measure a rope by rotating unit vectors at the end of a text, and at its start.

    The start is exact, the end has float32's error of the angle: where both agree within
    that error, the start's are returned.
    """
    dims = _dims(rope)
    units = mx.broadcast_to(mx.eye(dims)[None, :, None], (1, dims, 2, dims))

    def turn(offset: int) -> tuple[np.ndarray, np.ndarray]:
        out = np.array(rope(units, offset=offset))[0]  # (D, 2, D)
        partner = np.abs(np.array(rope(units[:, :, :1], offset=1))[0, 0, 0]).argsort()
        second = int(next(i for i in partner[::-1] if i != 0))
        pairs = np.arange(dims // 2)
        first = 2 * pairs if second == 1 else pairs
        complex_of = out[first, :, first] + 1j * out[first, :, first + second]
        return np.angle(complex_of[:, 1] / complex_of[:, 0]), np.abs(complex_of[:, 0])

    start, gains = turn(0)
    end, _ = turn(max(length - 2, 0))
    gain, error = float(np.median(gains)), 0.03
    if np.mean(np.abs(end - start) > error * np.abs(start)) > 0.25:
        return Rotation(end, gain, error)
    return Rotation(start, gain)


def _dims(rope: Any) -> int:
    """Return how many dimensions a rope rotates; 0 for SmolLM3's rope that rotates none."""
    freqs = getattr(rope, "_freqs", None)
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    return dims or (2 * freqs.size if freqs is not None else 0)


def transformers_rotations(config: dict[str, Any], length: int) -> dict[str, Rotation]:
    """Return transformers' rotations in a text of `length` tokens, by the kind of layer.

    Raises:
        KeyError: transformers has no such family.
        LookupError: its model has no rotary module of its own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    text = text_config(config)
    values = {k: v for k, v in text.items() if k != "model_type"} | {"pad_token_id": 0}
    family_name = {"kimi_k2": "deepseek_v3"}.get(text["model_type"], text["model_type"])
    settings = AutoConfig.for_model(family_name, **values)
    with torch.device("meta"):
        family = type(AutoModelForCausalLM.from_config(settings).base_model)
    module = __import__(family.__module__, fromlist=["_"])
    ropes = [
        each
        for name, each in vars(module).items()
        if name.endswith("RotaryEmbedding") and "Vision" not in name
    ]
    if not ropes:
        raise LookupError(f"{family.__module__} has no rotary module")
    rope = ropes[0](settings)
    kinds = list(getattr(rope, "layer_types", None) or []) or [_FULL]
    x = torch.zeros(1, 1, 1)
    positions = torch.tensor([[0, 1, length - 1]])
    each_kind = [[kind] if len(kinds) > 1 else [] for kind in kinds]
    return {
        kind: _from_cos_sin(rope(x, positions, *argument))
        for kind, argument in zip(kinds, each_kind, strict=True)
    }


def _from_cos_sin(answer: Any) -> Rotation:
    """Read frequencies and gain off cos and sin, or off complex numbers (DeepSeek-V2)."""
    if isinstance(answer, tuple):
        first, second = answer
        if second[0, 0, 0] > first[0, 0, 0]:  # GPT-J answers sin, cos; at position 0 cos is 1
            first, second = second, first
        cos, sin = (each[0, 1].double().numpy() for each in (first, second))
        turns = cos + 1j * sin
        half = turns.size // 2  # in most families each angle stands twice, in one of two orders
        if np.allclose(turns[:half], turns[half:], atol=1e-7):
            turns = turns[:half]
        elif np.allclose(turns[::2], turns[1::2], atol=1e-7):
            turns = turns[::2]
    else:
        turns = answer[0, 1].numpy()
    return Rotation(np.angle(turns), float(np.median(np.abs(turns))))


def differences(name: str) -> dict[str, Any] | None:
    """Return where mlx-lm's rotation is not transformers', or None if they cannot be compared.

    Keys: `short` (16 tokens) and `long` (the published length, at most 131,072 tokens; twice
    that length for a dynamic rope, which changes past it); under each the kind of layer, the
    largest relative difference of a frequency, and both gains, mlx-lm's first.
    """
    if "mlx_lm_cannot" in CONFIGS[name]:
        return None
    config = scaled(name)
    model, found = build(config), {}
    for label, length in (("short", LENGTH), ("long", _long(text_config(config)))):
        try:
            theirs = transformers_rotations(config, length)
        except (KeyError, LookupError, ValueError):
            return None
        ours = stock_rotations(name, model, length)
        figures = {kind: ours[kind].differs(theirs.get(kind) or theirs[_FULL]) for kind in ours}
        if kinds := {kind: each for kind, each in figures.items() if each}:
            found[label] = kinds
    return found


def _long(text: Mapping[str, Any]) -> int:
    length = text.get("max_position_embeddings") or text.get("n_positions") or 131_072
    entry = text.get("rope_scaling") or {}
    if "dynamic" in (entry.get("type"), entry.get("rope_type")):
        return 2 * length
    return min(length, 131_072)  # float32 has no exact angles beyond


def record() -> None:
    """Write what mlx-lm and transformers do now into the data file."""
    for name, entry in CONFIGS.items():
        entry.pop("rotations_differ", None)
        entry.pop("not_compared", None)
        found = differences(name)
        if found is None and "mlx_lm_cannot" not in entry:
            entry["not_compared"] = "transformers has no such family"
        elif found:
            entry["rotations_differ"] = found
    FILE.write_text(_json(CONFIGS) + "\n")


def _json(value: Any, indent: str = "") -> str:
    """Return JSON with a key a line and long lists wrapped at 100 columns."""
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(k)}: {_json(v, indent + '  ')}" for k, v in value.items()]
        return "{\n" + ",\n".join(f"{indent}  {line}" for line in lines) + f"\n{indent}}}"
    text = json.dumps(value)
    if isinstance(value, list) and len(text) > 96:
        words = textwrap.fill(text[1:-1], 98 - len(indent), break_long_words=False)
        return f"[\n{textwrap.indent(words, indent + '  ')}\n{indent}]"
    return text


if __name__ == "__main__":
    record()
