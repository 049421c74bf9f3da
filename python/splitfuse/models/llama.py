"""Llama 1 to 3.x, and what has its shape: SmolLM2, Mistral, and families that add a bias or a scale to it."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig
from .family import Family, Fields, Names
from .rope import rope

TENSORS: Names = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def config(fields: Fields, partial: float | None = None) -> ModelConfig:
    """The fields that Llama's configuration and those after its model have. `partial`: as rope()'s."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.head_dim(hidden, heads)
    bias = fields.flag("attention_bias")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", 2048),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.activation(default="silu"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        ropes=[rope(fields, head_dim, partial=partial)],
    )


def windows(fields: Fields, layers: int, kinds: list[str], default: int = 0) -> list[LayerConfig]:
    """Of `layer_types`, "sliding_attention" has the window that `sliding_window` gives, or `default`."""
    window = fields.integer("sliding_window", default)
    known = {"full_attention": 0, "sliding_attention": window}
    if len(kinds) != layers or not set(kinds) <= set(known) or ("sliding_attention" in kinds and window < 1):
        raise fields.error(
            f"layer_types and sliding_window, {window}: expected {layers} times full_attention or "
            "sliding_attention, and a window for the latter"
        )
    return [LayerConfig(window=known[kind]) for kind in kinds]


def _mistral(fields: Fields) -> ModelConfig:
    result = config(fields)
    if window := fields.integer("sliding_window", 0):
        result.layers = [LayerConfig(window=window)] * result.num_layers
    return result


LLAMA = Family("llama", ("LlamaForCausalLM",), config, TENSORS, harmless=("rotary_emb.inv_freq",))
MISTRAL = Family("mistral", ("MistralForCausalLM",), _mistral, TENSORS)
