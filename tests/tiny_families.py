"""A tiny random model of every family of mlx-lm, and what to expect of it.

A family's config is `SMALL`, cut to the fields it has, with its own entries on top.
What the rest of the table says (layers that are scaled, keys before queries, where in
the cache rotated keys are) is read off mlx-lm's files by eye, for the tests to hold
against what attach finds by itself.
"""

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

L0 = 16  # trained length, tokens

SMALL: dict[str, Any] = {
    "max_position_embeddings": L0,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "conv_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "vocab_size": 64,
    # Widths
    **dict.fromkeys(("hidden_size", "hidden_dim", "d_model", "model_dim", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "dim_model_base"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"), 32),
    # Layers and heads
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.5,
    "rotary_emb_base": 10_000,
    "sliding_window": 8,
    # Experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("n_group", "topk_group", "moe_layer_freq", "decoder_sparse_step"), 1),
    "moe_num_experts": 4,
    "first_k_dense_replace": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # Multipliers
    **dict.fromkeys(("logits_scaling", "embedding_multiplier", "residual_multiplier"), 1.0),
    "attention_multiplier": 0.25,
    "scale_depth": 1.4,
    "scale_emb": 1.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "use_qk_norm": False,
}

_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LONGCAT = {"attention_method": "MLA", "zero_expert_type": "identity"}
_KIMI_LINEAR = {
    "num_heads": 4,
    "head_dim": 16,
    "kda_layers": [1],
    "full_attn_layers": [2],
    "short_conv_kernel_size": 4,
}
_LLAMA4_QUERIES = {
    **_PLAIN_ROPE,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": L0,
}
_LFM2 = {
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 64,
    "block_multiple_of": 4,
    "block_ffn_dim_multiplier": 2,
    "block_auto_adjust_ff_dim": True,
    "layer_types": ["conv", "full_attention"],
    "num_dense_layers": 1,
    "use_expert_bias": True,
}
_GEMMA4 = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "sliding_window_pattern": 2,
    "layer_types": _SLIDING_THEN_FULL * 3,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.5,
            "rope_theta": 10_000.0,
        },
        "sliding_attention": {"rope_theta": 100.0},
    },
}


@dataclass
class Family:
    """One family: its config, and what attach has to find in it."""

    config: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None  # of the text model, where it is inside another
    scaled: tuple[int, ...] | None = None  # layers; None: all
    ropes: tuple[str, ...] = ("rope",)
    keys_first: tuple[str, ...] = ()  # those of its ropes that rotate keys first
    queries_only: tuple[int, ...] = ()  # layers that read another layer's keys
    pairs: int | None = None  # that rotate; None: all
    first_cache: int = 0  # the cache of layer 0
    part: str = "keys"  # of the cache, with the rotated dimensions
    at_end: bool = False  # they come after the others
    no_gain: str | None = None  # why queries cannot be multiplied
    one_scale: str | None = None  # why keys cannot move
    refused: str | None = None  # why attach refuses, a part of its words
    absent: str | None = None  # why there is no tiny model


_LATENT = Family(part="values", no_gain="a part of each query")
_WINDOWS = Family({"num_hidden_layers": 4}, scaled=(3,))
_NO_ROPE = "found none"
_NOT_KVCACHE = "only in layers with other caches"


def _like(family: Family, config: dict[str, Any] | None = None, **changes: Any) -> Family:
    return dataclasses.replace(family, config={**family.config, **(config or {})}, **changes)


_LATENT_AT_END = _like(_LATENT, part="keys", at_end=True)

FAMILIES: dict[str, Family] = {
    "Klear": Family(),
    "afm7": Family(
        {"num_kv_reuse_layers": 1},
        one_scale="keys are changed after they are rotated",
        no_gain="changed after",
    ),
    "afmoe": Family({"layer_types": _SLIDING_THEN_FULL}, refused=_NOT_KVCACHE),
    "apertus": Family({"post_norm": True, "qk_norm": True}),
    "baichuan_m1": Family({"sliding_window_layers": [0], "conv_window": 2}, scaled=(1,)),
    "bailing_hybrid": _like(_LATENT, {"layer_group_size": 2, "group_norm_size": 1}, scaled=(1,)),
    "bailing_moe": Family(),
    "bailing_moe_linear": Family({"layer_group_size": 2, "group_norm_size": 1}, scaled=(1,)),
    "bailing_moe_v3": _like(_LATENT, {"layer_group_size": 2}, scaled=(1,)),
    "bitnet": Family(absent="its kernel runs on Metal only"),
    "cohere": Family(),
    "cohere2": Family({"sliding_window_pattern": 2}, refused=_NOT_KVCACHE),
    "dbrx": Family(
        {
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        }
    ),
    "deepseek": Family(),
    "deepseek_v2": _like(_LATENT_AT_END, {"rope_scaling": {"factor": 1.0}}),
    "deepseek_v3": _LATENT,
    "deepseek_v32": _like(_LATENT, {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}),
    "deepseek_v41": Family(refused=_NOT_KVCACHE),
    "dots1": Family(),
    "ernie4_5": Family(),
    "ernie4_5_moe": Family(),
    "exaone": Family(),
    "exaone4": Family({"rope_scaling": None, "sliding_window_pattern": None}),
    "exaone_moe": Family({"layer_types": ["full_attention"] * 2, "is_moe_layer": [False, True]}),
    "falcon_h1": Family({"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}),
    "gear": Family({"layer_types": _SLIDING_THEN_FULL}, scaled=(1,)),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3": Family(text={"sliding_window_pattern": 2}, scaled=(1,)),
    "gemma3_text": Family({"sliding_window_pattern": 2}, scaled=(1,)),
    "gemma3n": Family(
        text={
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "rope_local_base_freq": 100.0,
            "final_logit_softcapping": 30.0,
            "layer_types": _SLIDING_THEN_FULL * 3,
            "activation_sparsity_pattern": [0.5] * 6,
            "altup_num_inputs": 2,
            "altup_coef_clip": 1.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        },
        scaled=(1, 3, 5),
        queries_only=(5,),
        keys_first=("rope",),
    ),
    "gemma4": Family(
        text=_GEMMA4, scaled=(1, 3, 5), queries_only=(5,), pairs=8, keys_first=("rope",)
    ),
    "gemma4_text": Family(
        _GEMMA4, scaled=(1, 3, 5), queries_only=(5,), pairs=8, keys_first=("rope",)
    ),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family({"rope_scaling": None}),
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _like(
        _LATENT,
        {
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_topk": 8,
            "rope_parameters": _PLAIN_ROPE,
        },
    ),
    "gpt2": Family({"n_ctx": 64, "n_positions": 64}, refused=_NO_ROPE),
    "gpt_bigcode": Family({"n_positions": 64, "n_inner": 64}, refused=_NO_ROPE),
    "gpt_neox": Family(),
    "gpt_oss": Family(scaled=(1,)),
    "gptj": Family({"rotary_dim": 8}, keys_first=("rope",), no_gain="a part of each query"),
    "granite": Family(),
    "granitemoe": Family(),
    "granitemoehybrid": Family(
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_proj_bias": False,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_n_groups": 1,
            "mamba_conv_bias": False,
        },
        scaled=(1,),
    ),
    "helium": Family(),
    "hunyuan": Family(
        {
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_cla": True,
            "cla_share_factor": 2,
            "use_qk_norm": True,
            "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0},
        },
        one_scale="changed after",
        no_gain="changed after",
    ),
    "hunyuan_v1_dense": Family(),
    "internlm2": Family(),
    "internlm3": Family(),
    "iquestloopcoder": Family(one_scale="one rope rotates keys", no_gain="is 4, not 2"),
    "jamba": Family(
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_expand": 2,
        },
        refused=_NO_ROPE,
    ),
    "kimi_k25": _like(_LATENT, text={}),
    "kimi_k3": Family(
        text={
            "linear_attn_config": _KIMI_LINEAR,
            "num_experts_per_token": 2,
            "num_expert_group": 1,
            "attn_res_block_size": 1,
            "routed_expert_hidden_size": 32,
        },
        refused=_NO_ROPE,
    ),
    "kimi_linear": Family(
        {
            "linear_attn_config": _KIMI_LINEAR,
            "model_max_length": L0,
        },
        refused=_NO_ROPE,
    ),
    "kimi_vl": _like(_LATENT, text={}),
    "laguna": Family(),
    "lfm2": Family(_LFM2, scaled=(1,)),
    "lfm2-vl": Family(text=_LFM2, scaled=(1,)),
    "lfm2_moe": Family(_LFM2, scaled=(1,)),
    "lille-130m": Family({"block_size": L0}),
    "llama": Family(),
    "llama4": Family(
        text={
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "rope_scaling": None,
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
        },
        refused=_NOT_KVCACHE,
    ),
    "llama4_text": Family({"intermediate_size_mlp": 64, "no_rope_layers": [1, 0]}, scaled=(0,)),
    "longcat_flash": _like(_LATENT, _LONGCAT),
    "longcat_flash_ngram": _like(_LATENT, _LONGCAT, first_cache=1),
    "mamba": Family(absent="no attention"),
    "mamba2": Family(absent="no attention"),
    "mellum": Family(
        {
            "layer_types": _SLIDING_THEN_FULL,
            "rope_parameters": dict.fromkeys(_SLIDING_THEN_FULL, _PLAIN_ROPE),
        },
        scaled=(1,),
    ),
    "mimo": Family(),
    "mimo_v2_flash": Family(
        {
            "hybrid_layer_pattern": [1, 0],
            "moe_layer_freq": [0, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 8,
            "swa_rope_theta": 100.0,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "swa_v_head_dim": 16,
        },
        scaled=(1,),
    ),
    "minicpm": Family(),
    "minicpm3": _like(
        _LATENT_AT_END,
        {
            "rope_scaling": {
                "type": "longrope",
                "original_max_position_embeddings": L0,
                "short_factor": 1.0,
                "long_factor": 1.0,
            }
        },
    ),
    "minimax": Family(),
    "minimax_m3_vl": Family(
        text={
            "moe_layer_freq": None,
            "dense_intermediate_size": 64,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
        ropes=("rope", "index_rope"),
        keys_first=("index_rope",),
        no_gain="is 1, not 2",
    ),
    "ministral3": Family({"rope_parameters": _LLAMA4_QUERIES}),
    "mistral3": Family(text={"model_type": "llama"}),
    "mistral4": _like(_LATENT, {"rope_parameters": _LLAMA4_QUERIES}),
    "mixtral": Family(),
    "muse_glimmer": Family(
        {"layer_types": _SLIDING_THEN_FULL, "layer_rope_theta": [1e4, 1e4]}, scaled=(1,)
    ),
    "muse_spark": Family(absent="its kernel rotates by itself, on Metal only; refused"),
    "nanbeige": Family(),
    "nanochat": Family(refused=_NO_ROPE),
    "nemotron": Family({"hidden_act": "relu2"}),
    "nemotron-nas": Family(
        {"block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 2}
    ),
    "nemotron_h": Family(
        {
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "mamba_proj_bias": False,
            "ssm_state_size": 16,
            "conv_kernel": 3,
            "n_groups": 2,
            "time_step_limit": [1.0, 2.0],
            "use_conv_bias": True,
            "hybrid_override_pattern": ["M", "*"],
        },
        refused=_NO_ROPE,
    ),
    "olmo": Family(absent="its file in mlx-lm adds a mask that is a word, and fails"),
    "olmo2": Family(),
    "olmo3": Family({"num_hidden_layers": 4}, scaled=(3,)),
    "olmo_hybrid": Family(
        {
            "num_hidden_layers": 2,
            "linear_allow_neg_eigval": True,
            "layer_types": ["linear_attention", "full_attention"],
        },
        scaled=(1,),
    ),
    "olmoe": Family(),
    "openelm": Family(
        {
            "num_transformer_layers": 2,
            "ffn_dim_divisor": 8,
            "num_query_heads": [4, 4],
            "num_kv_heads": [2, 2],
            "ffn_multipliers": [1.0, 1.0],
        }
    ),
    "phi": Family(),
    "phi3": Family(),
    "phi3small": Family(
        {
            "dense_attention_every_n_layers": 1,
            "ff_intermediate_size": 64,
            "gegelu_limit": 20.0,
            "vocab_size": 100_352,  # it silences fixed ids
        }
    ),
    "phimoe": Family(),
    "phixtral": Family({"num_vocab": 64}),
    "pixtral": Family(text={"model_type": "llama"}),
    "plamo": Family({"n_shared_head": 2}, ropes=("rotary_emb",)),
    "plamo2": Family({"hidden_size_per_head": 16, "mamba_num_heads": 4}, scaled=(1,)),
    "plamo3": Family({"sliding_window_pattern": 2}, scaled=(1,)),
    "prism_hadamard_qwen35": Family(absent="reads a packed format only"),
    "qwen": Family({"kv_channels": 16}, ropes=("rotary_emb",)),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen2_vl": Family(text={"model_type": "qwen2"}),
    "qwen3": Family(),
    "qwen3_5": Family(text={"num_hidden_layers": 4}, scaled=(3,)),
    "qwen3_5_moe": Family(text={"num_hidden_layers": 4}, scaled=(3,)),
    "qwen3_moe": Family(),
    "qwen3_next": _WINDOWS,
    "qwen3_vl": Family(text={"model_type": "qwen3"}),
    "qwen3_vl_moe": Family(text={"model_type": "qwen3_moe"}),
    "recurrent_gemma": Family(
        {
            "conv1d_width": 4,
            "logits_soft_cap": 30.0,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
        },
        refused=_NOT_KVCACHE,
    ),
    "rwkv7": Family(absent="no attention"),
    "seed_oss": Family(),
    "smollm3": Family({"no_rope_layers": [1, 0]}, scaled=(0,)),
    "solar_open": Family(),
    "spark2_5": Family(
        {
            "layer_types": _SLIDING_THEN_FULL,
            "rope_parameters": dict.fromkeys(_SLIDING_THEN_FULL, _PLAIN_ROPE),
        },
        scaled=(1,),
    ),
    "stablelm": Family({"use_qkv_bias": False}),
    "starcoder2": Family(),
    "step3p5": Family(
        {"num_attention_groups": 2, "moe_top_k": 2, "share_expert_dim": 32}, scaled=(1,)
    ),
    "talkie": Family(refused=_NO_ROPE),
    "telechat3": Family(),
    "youtu_llm": _LATENT_AT_END,
}


def config(name: str, **changes: Any) -> dict[str, Any]:
    """Return the config of a family, cut to the fields it has."""
    family = FAMILIES[name]
    fields = {field.name for field in dataclasses.fields(_module(name).ModelArgs)}
    config = {key: value for key, value in SMALL.items() if key in fields}
    config |= {"model_type": name, **family.config, **changes}
    if family.text is not None:
        config["text_config"] = {"model_type": name, **SMALL, **family.text, **changes}
    return config


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}")


def tiny(name: str, **changes: Any) -> Any:
    """A random model of a family; the same numbers every time."""
    module = _module(name)
    args = module.ModelArgs.from_dict(config(name, **changes))
    mx.random.seed(1)
    model = module.Model(args)
    model.update(tree_map(_spread, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def _spread(weight: mx.array) -> mx.array:
    """Sharper attention than fresh weights give, and norms that are not all one."""
    if weight.dtype != mx.float32:
        return weight
    noise = mx.random.normal(weight.shape)
    if weight.ndim < 2:
        return weight + 0.1 * noise
    return 1.5 * noise / weight.shape[-1] ** 0.5
