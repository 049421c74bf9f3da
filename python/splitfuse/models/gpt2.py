"""GPT-2: learned positions, matrices stored as [inputs, outputs]. GPT-BigCode (StarCoder, SantaCoder): the same with
matrices the usual way round, and one key head for all query heads."""

from __future__ import annotations

from .._core import ModelConfig
from .family import Family, Fields, Names, Part
from .parts import k_rows, of_group, q_rows, turned, v_rows

_GPT2: Names = {
    "embed": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "attn_norm": "ln_1",
    "attn.q": Part("attn.c_attn", turned(q_rows)),
    "attn.k": Part("attn.c_attn", turned(k_rows)),
    "attn.v": Part("attn.c_attn", turned(v_rows)),
    "attn.o": Part("attn.c_proj", turned()),
    "mlp_norm": "ln_2",
    "mlp.up": Part("mlp.c_fc", turned()),
    "mlp.down": Part("mlp.c_proj", turned()),
}
_BIGCODE: Names = {
    **_GPT2,
    "attn.q": Part("attn.c_attn", of_group(0)),
    "attn.k": Part("attn.c_attn", of_group(1)),
    "attn.v": Part("attn.c_attn", of_group(2)),
    "attn.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_BUFFERS = (".attn.bias", ".attn.masked_bias")


def _config(fields: Fields) -> ModelConfig:
    hidden = fields.integer(fields.which("n_embd", "hidden_size"))
    heads = fields.heads("n_head", "num_attention_heads")
    positions = fields.integer(fields.which("n_positions", "max_position_embeddings"), 1024)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("add_cross_attention", False)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers("n_layer", "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim(hidden, heads),
        intermediate_size=fields.integer("n_inner", 4 * hidden),
        max_position=positions,
        learned_positions=positions,
        norm="layer",
        norm_bias=True,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        attention_scale=0.0 if fields.flag("scale_attn_weights", True) else 1.0,
        activation=fields.activation("activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _bigcode(fields: Fields) -> ModelConfig:
    result = _config(fields)
    if fields.flag("multi_query", True):
        result.num_kv_heads = 1
    return result


GPT2 = Family(
    "gpt2", ("GPT2LMHeadModel",), _config, _GPT2, "transformer.h.{}.", _BUFFERS, base="transformer."
)
GPT_BIGCODE = Family(
    "gpt_bigcode",
    ("GPTBigCodeForCausalLM",),
    _bigcode,
    _BIGCODE,
    "transformer.h.{}.",
    _BUFFERS,
    base="transformer.",
)
