"""Llama 2 and 3.x, and models of the same shape such as SmolLM2."""

from __future__ import annotations

from .._core import ModelConfig
from .family import Family, Fields


def _config(fields: Fields) -> ModelConfig:
    fields.expect("hidden_act", "silu")
    fields.expect_neutral()
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if heads <= 0 or ("head_dim" not in fields and hidden % heads != 0):
        raise fields.error(f"num_attention_heads is {heads}; expected a divisor of hidden_size, {hidden}")
    return ModelConfig(
        family="llama",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // heads),
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", 2048),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        rope=fields.rope(),
        eos_token_ids=fields.eos_ids(),
    )


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    config=_config,
    tensors={
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
    },
    layer_prefix="model.layers.",
    harmless=("rotary_emb.inv_freq",),
)
