"""Qwen 1, 2, 2.5 and 3: Llama with biases on queries, keys and values, or with norms of queries and keys."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig
from . import llama
from .family import Family, Fields, Part
from .parts import for_keys, for_queries, k_rows, q_rows, v_rows
from .rope import rope

QK_NORMS = {
    "attn.q_norm": Part("self_attn.q_norm", for_queries),
    "attn.k_norm": Part("self_attn.k_norm", for_keys),
}


def windows(fields: Fields, layers: int) -> list[LayerConfig]:
    """As `layer_types` says, or with a window from `max_window_layers` on."""
    kinds = fields.words("layer_types")
    first, window = fields.integer("max_window_layers", 28), fields.get("sliding_window", missing=4096)
    if not fields.flag("use_sliding_window") or window is None:
        return []
    return llama.windows(
        fields,
        layers,
        kinds or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)],
        missing=4096,
    )


def _qwen2(fields: Fields) -> ModelConfig:
    result = llama.config(fields, kv_heads=32, longest=32768)
    result.qkv_bias, result.o_bias = True, False
    result.layers = windows(fields, result.num_layers)
    return result


def _qwen3(fields: Fields) -> ModelConfig:
    result = llama.config(fields, kv_heads=32, head_dim=128, longest=32768)
    result.qk_norm = "head"
    result.layers = windows(fields, result.num_layers)
    return result


def _qwen(fields: Fields) -> ModelConfig:
    """`use_dynamic_ntk` and `use_logn_attn` alter nothing up to `seq_length`, the length of training."""
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    head_dim = fields.head_dim(hidden, heads, "kv_channels")
    fields.expect("no_bias", True)
    fields.expect("scale_attn_weights", True)
    rotated = {
        "rope_theta": fields.number("rotary_emb_base", 10000.0),
        "partial_rotary_factor": fields.number("rotary_pct", 1.0),
    }
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size") // 2,
        max_position=fields.integer("seq_length"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=True,
        ropes=[rope(fields, head_dim, rotated, partial=1.0)],
    )


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), _qwen2, llama.TENSORS)
QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), _qwen3, {**llama.TENSORS, **QK_NORMS})
QWEN = Family(
    "qwen",
    ("QWenLMHeadModel",),
    _qwen,
    {
        "embed": "transformer.wte",
        "final_norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "attn_norm": "ln_1",
        "attn.q": Part("attn.c_attn", q_rows),
        "attn.k": Part("attn.c_attn", k_rows),
        "attn.v": Part("attn.c_attn", v_rows),
        "attn.o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.gate": "mlp.w2",
        "mlp.up": "mlp.w1",
        "mlp.down": "mlp.c_proj",
    },
    layer_prefix="transformer.h.{}.",
    harmless=("rotary_emb.inv_freq",),
)
