"""Families whose norms are RMS norms."""

from __future__ import annotations

from typing import Any

import torch

from tiny_models import Tiny

State = dict[str, torch.Tensor]
Config = dict[str, Any]
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 44}


def _qwen1(state: State, config: Config) -> tuple[State, Config]:
    """A Qwen2 in which every query head has its own keys is a Qwen of other names."""
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
    }
    out: State = {}
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"model.layers.{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            out[f"transformer.h.{layer}.attn.c_attn.{kind}"] = torch.cat(parts)
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name] = tensor
    return out, {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": 2 * config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": config["max_position_embeddings"],
        "no_bias": True,
        "scale_attn_weights": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
    }


def _internlm2(state: State, config: Config) -> tuple[State, Config]:
    """A Llama of other names, with q, k and v of a group of heads together."""
    names = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    out: State = {}
    for layer in range(config["num_hidden_layers"]):
        q, k, v = (state.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv")
        parts = [part.view(groups, -1, dim, part.shape[-1]) for part in (q, k, v)]
        out[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(parts, 1).reshape(-1, q.shape[-1])
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name] = tensor
    kept = {
        key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias", "head_dim")
    }
    return out, {**kept, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}


def _minicpm(state: State, config: Config) -> tuple[State, Config]:
    """A Granite whose scales have other names."""
    kept = {key: value for key, value in config.items() if not key.endswith(("_multiplier", "_scaling"))}
    return state, {
        **kept,
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "scale_emb": config["embedding_multiplier"],
        "scale_depth": config["residual_multiplier"] * config["num_hidden_layers"] ** 0.5,
        "dim_model_base": config["hidden_size"] / config["logits_scaling"],
    }


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.02 * i for i in range(12)],
    "long_factor": [1.5 + 0.5 * i for i in range(12)],
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}

RMS: dict[str, Tiny] = {
    "llama": Tiny("llama"),
    "llama, biases, yarn": Tiny(
        "llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}, tokens=400
    ),
    "mistral, window 40": Tiny("mistral", {"sliding_window": 40}),
    "mistral, no window": Tiny("mistral", {"sliding_window": None, "head_dim": 40}),
    "mixtral": Tiny("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 70}),
    "qwen": Tiny("qwen2", {"num_key_value_heads": 6}, _qwen1),
    "qwen2": Tiny("qwen2"),
    "qwen2, windows from layer 1, tied": Tiny(
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 33,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe": Tiny("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 60}),
    "qwen2_moe, some layers dense": Tiny(
        "qwen2_moe",
        {
            **MOE,
            "shared_expert_intermediate_size": 36,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 5,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3": Tiny("qwen3", {"head_dim": 40}),
    "qwen3_moe": Tiny("qwen3_moe", {**MOE, "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "phi3": Tiny("phi3", {"sliding_window": 50}),
    "phi3, longrope, short": Tiny(
        "phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 128}, tokens=60
    ),
    "phi3, longrope, long": Tiny("phi3", {"rope_parameters": LONGROPE}, tokens=300),
    "phi3, partial": Tiny("phi3", {"partial_rotary_factor": 0.5}),
    "gemma": Tiny("gemma", {"head_dim": 32}),
    "gemma2": Tiny(
        "gemma2",
        {
            "head_dim": 32,
            "sliding_window": 37,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Tiny("gemma3_text", {"head_dim": 24, "sliding_window": 41, "num_hidden_layers": 7}),
    "olmo2": Tiny("olmo2"),
    "granite": Tiny(
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "minicpm": Tiny(
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.8,
            "attention_multiplier": 24**-0.5,
            "logits_scaling": 9.0,
            "tie_word_embeddings": True,
        },
        _minicpm,
    ),
    "smollm3": Tiny("smollm3", {"num_hidden_layers": 5}),
    "smollm3, windows": Tiny(
        "smollm3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 50}
    ),
    "exaone4": Tiny("exaone4", {"sliding_window": 45, "layer_types": KINDS}),
    "exaone4, no windows": Tiny("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "internlm2": Tiny("llama", {}, _internlm2),
    "glm": Tiny("glm", {"head_dim": 24}),
    "glm4": Tiny("glm4", {"head_dim": 40}),
    "gpt_oss": Tiny(
        "gpt_oss",
        {
            "head_dim": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 30,
            "intermediate_size": 88,
        },
    ),
}
