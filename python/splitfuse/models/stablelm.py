"""StableLM: a quarter of each head is rotated; some have norms of queries and keys, each head's in a tensor of its own,
or an MLP that reads attention's norm."""

from __future__ import annotations

from .._core import ModelConfig
from . import llama
from .family import Family, Fields, Names, Part
from .rope import rope

_TENSORS: Names = {
    **llama.TENSORS,
    "attn.q_norm": Part("self_attn.q_layernorm.norms.{}", many=lambda config: config.num_heads),
    "attn.k_norm": Part("self_attn.k_layernorm.norms.{}", many=lambda config: config.num_kv_heads),
}


def _config(fields: Fields) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    head_dim = fields.head_dim(hidden, heads)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", 32),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", 4096),
        ropes=[rope(fields, head_dim, partial=0.25)],
        norm="layer",
        norm_bias=True,
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        parallel="shared" if fields.flag("use_parallel_residual") else "none",
        qk_norm="head" if fields.flag("qk_layernorm") else "none",
        qkv_bias=fields.flag("use_qkv_bias"),
        activation=fields.activation(default="silu"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )


STABLELM = Family("stablelm", ("StableLmForCausalLM",), _config, _TENSORS, harmless=("rotary_emb.inv_freq",))
