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


def config(
    fields: Fields,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    longest: int = 2048,
    theta: float = 10000.0,
    partial: float | None = None,
    trained: int | None = None,
) -> ModelConfig:
    """The fields that Llama's configuration and those after its model have. `kv_heads`, `head_dim` and `longest`, in
    tokens: where the file leaves them out. `theta`, `partial`, `trained`: as rope()'s."""
    hidden, heads = fields.integer("hidden_size", low=1), fields.heads()
    head_dim = fields.head_dim(hidden, heads, missing=head_dim)
    bias = fields.flag("attention_bias")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads, missing=kv_heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", longest),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.activation(default="silu"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        ropes=[rope(fields, head_dim, theta=theta, partial=partial, trained=trained)],
    )


def windows(fields: Fields, layers: int, kinds: list[str], missing: int | None = None) -> list[LayerConfig]:
    """Of `layer_types`, "sliding_attention" has the window that `sliding_window` gives; `missing`: as get()'s."""
    window = fields.integer("sliding_window", 0, missing=missing)
    known = {"full_attention": 0, "sliding_attention": window}
    if len(kinds) != layers or not set(kinds) <= set(known) or ("sliding_attention" in kinds and window < 1):
        raise fields.error(
            f"layer_types and sliding_window, {window}: expected {layers} times full_attention or "
            "sliding_attention, and a window for the latter"
        )
    return [LayerConfig(window=known[kind]) for kind in kinds]


def _mistral(fields: Fields) -> ModelConfig:
    result = config(fields, kv_heads=8, longest=131072)
    if window := fields.integer("sliding_window", 0, missing=4096):
        result.layers = [LayerConfig(window=window)] * result.num_layers
    return result


LLAMA = Family("llama", ("LlamaForCausalLM",), config, TENSORS, harmless=("rotary_emb.inv_freq",))
MISTRAL = Family("mistral", ("MistralForCausalLM",), _mistral, TENSORS)
