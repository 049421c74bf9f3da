"""Phi-1 to Phi-2: attention and MLP read one norm, a part of each head is rotated, every matrix has a bias."""

from __future__ import annotations

from .._core import ModelConfig
from .family import Family, Fields, Names
from .rope import rope

_TENSORS: Names = {
    "embed": "model.embed_tokens",
    "final_norm": "model.final_layernorm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.dense",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def _config(fields: Fields) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    head_dim = fields.head_dim(hidden, heads)
    fields.expect("qk_layernorm", False)
    fields.expect("tie_word_embeddings", False)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", 2048),
        ropes=[rope(fields, head_dim, partial=0.5)],
        norm="layer",
        norm_bias=True,
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        parallel="shared",
        activation=fields.activation(default="gelu_new"),
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        lm_head_bias=True,
    )


PHI = Family("phi", ("PhiForCausalLM",), _config, _TENSORS, harmless=("rotary_emb.inv_freq",))
