"""GLM-4: half of a head is rotated, neighbours together; GLM-4-0414 also has norms after attention and MLP."""

from __future__ import annotations

from .._core import ModelConfig
from . import llama
from .family import Family, Fields, Names, Part
from .parts import gate_rows, half_split, up_rows
from .rope import rope

_TENSORS: Names = {
    **llama.TENSORS,
    "attn.q": Part("self_attn.q_proj", half_split()),
    "attn.k": Part("self_attn.k_proj", half_split()),
    "mlp.gate": Part("mlp.gate_up_proj", gate_rows),
    "mlp.up": Part("mlp.gate_up_proj", up_rows),
}


def _glm(fields: Fields) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    head_dim = fields.head_dim(hidden, heads, missing=128)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", 2),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", 131072),
        norm_eps=fields.number("rms_norm_eps", 1.5625e-07),
        activation=fields.activation(default="silu"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=fields.flag("attention_bias", True),
        ropes=[rope(fields, head_dim, partial=0.5)],
    )


def _glm4(fields: Fields) -> ModelConfig:
    result = _glm(fields)
    result.norm_place = "both"
    return result


GLM = Family("glm", ("GlmForCausalLM",), _glm, _TENSORS)
GLM4 = Family(
    "glm4",
    ("Glm4ForCausalLM",),
    _glm4,
    {
        **_TENSORS,
        "attn_post_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
    },
)
