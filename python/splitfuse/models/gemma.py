"""Gemma 1, 2 and 3 (text): norms stored less one, embeddings scaled by sqrt(hidden); Gemma 2 caps scores and logits,
Gemma 3 has norms of queries and keys and a second RoPE for layers with a window."""

from __future__ import annotations

import math

import numpy as np

from .._core import LayerConfig, ModelConfig, RopeConfig
from . import llama
from .family import Family, Fields, Names, Part
from .parts import for_keys, for_queries, one_more
from .rope import rope

_TENSORS: Names = {
    **llama.TENSORS,
    "final_norm": Part("model.norm", one_more()),
    "attn_norm": Part("input_layernorm", one_more()),
    "mlp_norm": Part("post_attention_layernorm", one_more()),
}
_BOTH: Names = {
    **_TENSORS,
    "attn_post_norm": Part("post_attention_layernorm", one_more()),
    "mlp_norm": Part("pre_feedforward_layernorm", one_more()),
    "mlp_post_norm": Part("post_feedforward_layernorm", one_more()),
}
_QK_NORMS: Names = {
    "attn.q_norm": Part("self_attn.q_norm", one_more(for_queries)),
    "attn.k_norm": Part("self_attn.k_norm", one_more(for_keys)),
}


def _shared(fields: Fields, activation: str, kv_heads: int, longest: int = 8192) -> ModelConfig:
    """What all three have. `kv_heads`, `longest`: where the file leaves them out."""
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    fields.expect("use_bidirectional_attention", False)
    bias = fields.flag("attention_bias")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads, missing=kv_heads),
        head_dim=fields.integer("head_dim", 256),
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", longest),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=activation,
        embed_scale=float(np.float32(math.sqrt(hidden))),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
    )


def _activation(fields: Fields) -> str:
    """Of Gemma 1, whose old files say `hidden_act` "gelu" though it was trained with the approximation."""
    activation = "gelu_tanh" if fields.get("hidden_act", "gelu") == "gelu" else fields.activation()
    if "hidden_activation" in fields and fields.activation("hidden_activation") != activation:
        raise fields.error(
            f"hidden_activation is {fields.get('hidden_activation')!r}, but hidden_act differs"
        )
    return activation


def _gemma(fields: Fields) -> ModelConfig:
    result = _shared(fields, _activation(fields), kv_heads=16)
    result.ropes = [rope(fields, result.head_dim)]
    return result


def _scores(fields: Fields, longest: int) -> ModelConfig:
    """What Gemma 2 and 3 have."""
    activation = fields.activation("hidden_activation", "gelu_pytorch_tanh")
    result = _shared(fields, activation, kv_heads=4, longest=longest)
    result.norm_place = "both"
    result.attention_scale = fields.positive("query_pre_attn_scalar", 256) ** -0.5
    return result


def _gemma2(fields: Fields) -> ModelConfig:
    result = _scores(fields, longest=8192)
    result.ropes = [rope(fields, result.head_dim)]
    result.attention_softcap = fields.number("attn_logit_softcapping", 0, missing=50)
    result.logit_softcap = fields.number("final_logit_softcapping", 0, missing=30)
    kinds = fields.words("layer_types") or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(result.num_layers)
    ]
    result.layers = llama.windows(fields, result.num_layers, kinds, missing=4096)
    return result


def _gemma3(fields: Fields) -> ModelConfig:
    result = _scores(fields, longest=131072)
    result.qk_norm = "head"
    result.attention_softcap = fields.number("attn_logit_softcapping", 0)
    result.logit_softcap = fields.number("final_logit_softcapping", 0)
    pattern = fields.integer(fields.which("sliding_window_pattern", "_sliding_window_pattern"), 6, low=1)
    kinds = fields.words("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(result.num_layers)
    ]
    layers = llama.windows(fields, result.num_layers, kinds, missing=4096)
    result.layers = [LayerConfig(window=layer.window, rope=1 if layer.window else 0) for layer in layers]
    result.ropes = _two_ropes(fields, result.head_dim)
    return result


def _two_ropes(fields: Fields, head_dim: int) -> list[RopeConfig]:
    """Of layers without a window and with one."""
    given = fields.part(fields.object("rope_parameters"))
    if unknown := sorted(given.names() - {"full_attention", "sliding_attention"}):
        raise fields.error(f"rope_parameters: {unknown[0]} is neither full_attention nor sliding_attention")
    full = {**given.object("full_attention"), **fields.object("rope_scaling")}
    local = given.object("sliding_attention")
    return [
        rope(fields, head_dim, full, theta=fields.number("rope_theta", 1e6)),
        rope(fields, head_dim, local, theta=fields.number("rope_local_base_freq", 1e4)),
    ]


GEMMA = Family("gemma", ("GemmaForCausalLM",), _gemma, _TENSORS)
GEMMA2 = Family("gemma2", ("Gemma2ForCausalLM",), _gemma2, _BOTH)
GEMMA3 = Family("gemma3", ("Gemma3ForCausalLM",), _gemma3, {**_BOTH, **_QK_NORMS})
