"""Families whose norms are layer norms."""

from __future__ import annotations

from typing import Any

import torch

from tiny_models import Tiny

State = dict[str, torch.Tensor]
Config = dict[str, Any]
PLAIN = {"num_key_value_heads": None, "intermediate_size": None}  # no such fields in these families
FALCON_RW = {**PLAIN, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
FALCON_40B = {**PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 100}


def _bare(*buffers: str) -> Any:
    """As a model without its head is saved, and with buffers in each layer that are no weights."""

    def rewrite(state: State, config: Config) -> tuple[State, Config]:
        base = next(iter(state)).split(".")[0] + "."
        state = {
            name.removeprefix(base): tensor for name, tensor in state.items() if name != "lm_head.weight"
        }
        state.update({f"h.{layer}.{name}": torch.ones(1, 1, 7, 7) for layer in range(3) for name in buffers})
        return state, config

    return rewrite


LAYER_NORM: dict[str, Tiny] = {
    "opt": Tiny("opt", {**PLAIN, "ffn_dim": 100}),
    "opt, 350m": Tiny(
        "opt", {**PLAIN, "ffn_dim": 100, "do_layer_norm_before": False, "word_embed_proj_dim": 56}
    ),
    "opt, no biases, bare norms": Tiny(
        "opt",
        {
            **PLAIN,
            "ffn_dim": 100,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "opt, no final norm": Tiny(
        "opt", {**PLAIN, "ffn_dim": 100, "_remove_final_layer_norm": True}, rewrite=_bare()
    ),
    "falcon, 7b": Tiny("falcon", PLAIN),
    "falcon, 40b": Tiny("falcon", FALCON_40B),
    "falcon, 11b": Tiny("falcon", {**FALCON_40B, "num_ln_in_parallel_attn": 1, "activation": "gelu_new"}),
    "falcon, rw": Tiny("falcon", FALCON_RW),
    "falcon, rotary one after the other": Tiny("falcon", {**FALCON_RW, "alibi": False}),
    "falcon, alibi of one key head": Tiny("falcon", {**PLAIN, "alibi": True, "tie_word_embeddings": False}),
    "bloom": Tiny("bloom", {**PLAIN, "pretraining_tp": 2}),
    "bloom, bare": Tiny("bloom", PLAIN, rewrite=_bare()),
    "gpt2": Tiny("gpt2", PLAIN),
    "gpt2, bare": Tiny(
        "gpt2",
        {**PLAIN, "n_inner": 100, "scale_attn_weights": False, "activation_function": "relu"},
        rewrite=_bare("attn.bias", "attn.masked_bias"),
    ),
    "gpt_bigcode": Tiny("gpt_bigcode", PLAIN),
    "gpt_bigcode, every head its keys": Tiny("gpt_bigcode", {**PLAIN, "multi_query": False, "n_inner": 100}),
    "gpt_neox": Tiny("gpt_neox", {"num_key_value_heads": None}),
    "gpt_neox, one after the other": Tiny(
        "gpt_neox",
        {
            "num_key_value_heads": None,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rotary_pct": 1.0,
            "rotary_emb_base": 500,
            "hidden_act": "gelu_fast",
            "tie_word_embeddings": True,
        },
    ),
    "gptj": Tiny("gptj", {**PLAIN, "rotary_dim": 12}),
    "gptj, whole heads": Tiny("gptj", {**PLAIN, "rotary_dim": 24, "n_inner": 100}),
    "phi": Tiny("phi"),
    "phi, every head its keys": Tiny("phi", {"num_key_value_heads": None, "partial_rotary_factor": 0.75}),
    "stablelm": Tiny("stablelm"),
    "stablelm, parallel": Tiny(
        "stablelm",
        {
            "use_parallel_residual": True,
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "tie_word_embeddings": True,
        },
    ),
    "stablelm, norms of heads": Tiny("stablelm", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "starcoder2": Tiny("starcoder2"),
    "starcoder2, window 40": Tiny(
        "starcoder2", {"sliding_window": 40, "use_bias": False, "tie_word_embeddings": False}
    ),
    "cohere": Tiny("cohere"),
    "cohere, norms of heads": Tiny(
        "cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.8, "rope_theta": 10000.0}
    ),
    "cohere2, window 40": Tiny("cohere2", {"sliding_window": 40, "num_hidden_layers": 5}),
}
