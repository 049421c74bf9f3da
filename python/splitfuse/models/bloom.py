"""BLOOM: ALiBi, a norm of the embeddings, queries, keys and values of each head in one matrix."""

from __future__ import annotations

from .._core import ModelConfig
from . import alibi
from .family import Family, Fields, Names, Part
from .parts import of_head

_TENSORS: Names = {
    "embed": "transformer.word_embeddings",
    "embed_norm": "transformer.word_embeddings_layernorm",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "attn.q": Part("self_attention.query_key_value", of_head(0)),
    "attn.k": Part("self_attention.query_key_value", of_head(1)),
    "attn.v": Part("self_attention.query_key_value", of_head(2)),
    "attn.o": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def _config(fields: Fields) -> ModelConfig:
    hidden = fields.integer(fields.which("n_embed", "hidden_size"))
    heads = fields.heads("n_head", "num_attention_heads")
    fields.expect("apply_residual_connection_post_layernorm", False)
    fields.expect("slow_but_exact", False)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers("n_layer", "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim(hidden, heads),
        intermediate_size=4 * hidden,
        max_position=fields.integer("seq_length", 2048),
        embed_norm=True,
        norm="layer",
        norm_bias=True,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        alibi_slopes=alibi.slopes(heads),
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


BLOOM = Family("bloom", ("BloomForCausalLM",), _config, _TENSORS, "transformer.h.{}.", base="transformer.")
