"""GPT-NeoX and Pythia: a part of each head is rotated; attention and MLP each read the stream through a norm of their
own, at once or one after the other."""

from __future__ import annotations

from .._core import ModelConfig
from .family import Family, Fields, Names, Part
from .parts import of_head
from .rope import rope

_TENSORS: Names = {
    "embed": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "attn_norm": "input_layernorm",
    "attn.q": Part("attention.query_key_value", of_head(0)),
    "attn.k": Part("attention.query_key_value", of_head(1)),
    "attn.v": Part("attention.query_key_value", of_head(2)),
    "attn.o": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def _config(fields: Fields) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    head_dim = fields.head_dim(hidden, heads)
    bias = fields.flag("attention_bias", True)
    partial, theta = fields.number("rotary_pct", 0.25), fields.number("rotary_emb_base", 10000)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", 2048),
        ropes=[rope(fields, head_dim, partial=partial, theta=theta)],
        norm="layer",
        norm_bias=True,
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        parallel="own" if fields.flag("use_parallel_residual", True) else "none",
        activation=fields.activation(default="gelu"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )


GPT_NEOX = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM",),
    _config,
    _TENSORS,
    "gpt_neox.layers.{}.",
    harmless=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
)
