"""Hostile config.json files: values, structure, and the file itself."""

import json
from collections.abc import Iterator
from typing import Any

from .case import (
    ALL,
    BOTH,
    FINE,
    REFUSED,
    Case,
    both,
    config,
    deep,
    gone,
    inside,
    linked,
    made_folder,
    piped,
    put,
    sparse,
)

_WRONG: dict[str, Any] = {
    "a text": "64",
    "a list": [64],
    "an object": {"a": 1},
    "true": True,
    "negative": -1,
    "zero": 0,
    "half": 1.5,
    "a float beyond all": 1e308,
    "a million": 1 << 20,
    "beyond 64 bits": 1 << 70,
    "a thousand digits": 10**1000,
}
_SIZES: tuple[str, ...] = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_SIZES += ("intermediate_size", "vocab_size")
_FEW = ("a text", "a list", "true", "zero", "beyond 64 bits")
# Sizes of a kind that fits all tensors: the answers differ, and no file says that they should not.
_HELD = ("head_dim",)
_SETTINGS: dict[str, list[Any]] = {
    "rope_theta": ["1e4", [], True, 0, -1.0, 1e308, float("nan"), float("inf")],
    "rms_norm_eps": ["tiny", [], {}, True, -1.0, float("nan")],
    "max_position_embeddings": ["32", [], {}, True, 0, -5, 1.5, float("nan")],
    "model_type": ["", "base", "os", "../llama", "llama\n", 5, None, [], {}, True, "x" * 100_000],
    "tie_word_embeddings": ["yes", 1, [], {}],
    "eos_token_id": ["</s>", -1, 1.5, [1, "a"], [[2]], {}, 1 << 40, True],
    "torch_dtype": [5, "float1", [], {}, "__class__"],
    "rope_scaling": ["clex", 5, [], True, {"type": 5}, {"type": "no"}, {"factor": 2}],
    "rope_parameters": ["x", [], 5],
    "model_file": ["evil.py", "../outside/evil.py", "/etc/passwd", 5, [], {}],
    "quantization": [5, "q4", [], {"bits": 4}, {"bits": 0, "group_size": 0}, {"group_size": 64}],
    "layer_types": ["x", 5, ["no"]],
    "text_config": ["x", 5, []],
    "attention_bias": ["yes", True],
}
_CLEX: dict[str, list[Any]] = {
    "max_factor": ["8", [], True, 0, -1, 1e308, float("nan"), 1 << 70, None],
    "param_factor": ["1", 0, -1, 1e9, 1 << 40, float("inf")],
    "act": ["exec", 5, [], "__class__"],
    "time_dt": ["x", 0, -1, float("nan"), 1e-300],
    "factor": ["x", 0, 1e308, []],
    "log_scale": ["yes", 1, []],
    "unknown": [1],
}
_YARN: dict[str, list[Any]] = {
    "factor": ["4", [], True, 0, -1, 0.5, 1e308, float("nan"), float("inf"), None, ...],
    "beta_fast": ["32", 0, -1, float("nan")],
    "beta_slow": ["1", -1, float("nan"), 1e308],
    "original_max_position_embeddings": ["x", 0, -1, 1e308, []],
    "attention_factor": ["x", float("nan")],
    "mscale": ["x"],
}
_FILES: dict[str, Any] = {
    "empty": put("config.json", ""),
    "no JSON": put("config.json", "hidden_size: 64"),
    "cut": put("config.json", '{"model_type": "llama", "hidden'),
    "null": put("config.json", "null"),
    "a list": put("config.json", "[1]"),
    "a number": put("config.json", "5"),
    "a text": put("config.json", '"llama"'),
    "UTF-16": put("config.json", '{"model_type": "llama"}'.encode("utf-16")),
    "no UTF-8": put("config.json", b'{"model_type": "\xff\xfe"}'),
    "deep": put("config.json", deep()),
    "deep within": put("config.json", '{"model_type": "llama", "x": ' + deep() + "}"),
    "deep objects": put("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "5,000 digits": put("config.json", '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"),
    "300 MB": sparse("config.json", 300 << 20, b"{"),
    "a folder": made_folder("config.json"),
    "a pipe": piped("config.json"),
    "gone": gone("config.json"),
    "a link to zeros": linked("config.json", "/dev/zero"),
    "a link to itself": linked("config.json", "config.json"),
    "a link to nothing": linked("config.json", "nowhere.json"),
    "a link out": linked("config.json", "OUTSIDE/secret.json"),
    "zeros": put("config.json", b"\0" * 1000),
    "a surrogate": put("config.json", '{"model_type": "\\ud800"}'),
    "escapes": config(model_type="\x1b]0;owned\x07\x1b[2J"),
    "lines": config(model_type="a\nb\r\nc\u2028d"),
}
_PLAIN = {"model_type", "rope_theta", "max_position_embeddings", "rope_scaling", "rope_parameters"}


# Settings that nothing reads, or whose values are odd and have a meaning: the usual answer.
_HARMLESS = {
    "text_config []",
    f"eos_token_id {1 << 40}",  # no text ends with it; a note says so
    *(f"ours {name}" for name in ("factor 0", "time_dt 1e-300")),
    # Names code, which is never run.
    *(f"model_file {json.dumps(value)}" for value in _SETTINGS["model_file"]),
    # No tensor is quantised.
    'quantization {"bits": 0, "group_size": 0}',
}
# What a conversion reads, and mlx-lm does not; whether the embedding is the head, the weights say.
_UNREAD = {
    *(f"torch_dtype {value}" for value in ("5", "{}", "[]", '"__class__"')),
    *(f"tie_word_embeddings {value}" for value in ('"yes"', "1", "[]", "{}")),
}


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for name, edit in _FILES.items():
        yield Case("config file", name, "ours", edit, ALL)
    for key in _SIZES:
        for name, value in _WRONG.items():
            yield Case("size", f"{key} {name}", "ours", config(**{key: value}), ALL)
    for key in _HELD:
        for name in _FEW:
            yield Case("size", f"{key} {name}", "ours", config(**{key: _WRONG[name]}), BOTH)
    for key, values in _SETTINGS.items():
        for value in values:
            base = "stock" if key in _PLAIN else "ours"
            name = f"{key} {json.dumps(value)[:40]}"
            status = FINE if name in _HARMLESS else REFUSED
            other = {"generate": FINE} if name in _UNREAD else {}
            yield Case("setting", name, base, config(**{key: value}), status=status, other=other)
    for table, base in ((_CLEX, "ours"), (_YARN, "yarn")):
        for key, values in table.items():
            for value in values:
                shown = "gone" if value is ... else json.dumps(value)[:40]
                edit = inside("rope_scaling", **{key: value})
                name = f"{base} {key} {shown}"
                status = FINE if name in _HARMLESS else REFUSED
                yield Case("scaling", name, base, edit, ALL, status)
    for kind in ("linear", "dynamic", "ntk", "gene", "gene-param", "clex", "yarn", "llama3", "su"):
        for value in ("4", 0, -1, 1e308, float("nan")):
            entry = {"type": kind, "factor": value}
            edit = config(rope_scaling=entry, model_file="mlx_clex_model.py")
            yield Case("scaling", f"{kind}: factor {json.dumps(value)}", "stock", edit)
    # What must go on to work.
    for name, edit in {
        "an unknown key": config(unknown={"a": [1]}),
        "auto_map": both(config(auto_map={"AutoConfig": "evil.Evil"}), put("evil.py", "1 / 0")),
        "another architecture": config(architectures=["EvilForCausalLM"]),
    }.items():
        yield Case("harmless", name, "ours", edit, ALL, FINE)


KEYS = (*_SIZES, *_SETTINGS, "head_dim", "layer_types", "partial_rotary_factor")
SCALING_KEYS = (*_CLEX, *_YARN)
