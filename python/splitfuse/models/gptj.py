"""GPT-J: attention and MLP read one norm, a part of each head is rotated, neighbours together, the head has a bias."""

from __future__ import annotations

from .._core import ModelConfig, RopeConfig, rope_frequencies
from .family import Family, Fields, Names, Part
from .parts import half_split

_TENSORS: Names = {
    "embed": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "attn_norm": "ln_1",
    "attn.q": Part("attn.q_proj", half_split()),
    "attn.k": Part("attn.k_proj", half_split()),
    "attn.v": "attn.v_proj",
    "attn.o": "attn.out_proj",
    "mlp.up": "mlp.fc_in",
    "mlp.down": "mlp.fc_out",
}


def _config(fields: Fields) -> ModelConfig:
    hidden = fields.integer(fields.which("n_embd", "hidden_size"))
    heads = fields.heads("n_head", "num_attention_heads")
    head_dim = fields.head_dim(hidden, heads)
    rotated = fields.integer("rotary_dim", missing=64)
    if rotated % 2 or not 0 < rotated <= min(head_dim, 1024):
        raise fields.error(f"rotary_dim is {rotated}; expected an even number up to {min(head_dim, 1024)}")
    fields.expect("tie_word_embeddings", False)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers("n_layer", "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("n_inner", 4 * hidden),
        max_position=fields.integer(fields.which("n_positions", "max_position_embeddings"), 2048),
        ropes=[RopeConfig(inv_freq=rope_frequencies(10000.0, rotated))],
        norm="layer",
        norm_bias=True,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        parallel="shared",
        activation=fields.activation("activation_function", "gelu_new"),
        gated=False,
        mlp_bias=True,
        lm_head_bias=True,
    )


GPTJ = Family(
    "gptj",
    ("GPTJForCausalLM",),
    _config,
    _TENSORS,
    "transformer.h.{}.",
    harmless=(".attn.bias", ".attn.masked_bias"),
)
