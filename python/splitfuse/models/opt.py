"""OPT: learned positions, the first of which is row 2. OPT-350m has its norms after the sums, none at the end, and a
narrower table of embeddings."""

from __future__ import annotations

from .._core import ModelConfig
from .family import Family, Fields, Names, Part
from .parts import ones

_OFFSET = 2
_TENSORS: Names = {
    "embed": "model.decoder.embed_tokens",
    "embed_in": "model.decoder.project_in",
    "embed_positions": "model.decoder.embed_positions",
    "final_norm": "model.decoder.final_layer_norm",
    "embed_out": "model.decoder.project_out",
    "lm_head": "lm_head",
    "attn_norm": "self_attn_layer_norm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "attn_post_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "mlp_post_norm": "final_layer_norm",
}
_PLAIN_NORM = Part("self_attn.q_proj", ones)


def _tensors(config: ModelConfig) -> Names:
    if config.norm_bias:
        return _TENSORS
    layers = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
    final = Part("model.decoder.embed_positions", ones)
    return {**_TENSORS, **dict.fromkeys(layers, _PLAIN_NORM), "final_norm": final}


def _config(fields: Fields) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    longest = fields.integer("max_position_embeddings", 2048)
    before = fields.flag("do_layer_norm_before", True)
    bias = fields.flag("enable_bias", True)
    table = fields.integer("word_embed_proj_dim", hidden)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim(hidden, heads),
        intermediate_size=fields.integer("ffn_dim"),
        max_position=longest,
        embed_size=0 if table == hidden else table,
        learned_positions=longest + _OFFSET,
        position_offset=_OFFSET,
        norm="layer",
        norm_place="pre" if before else "residual",
        norm_bias=fields.flag("layer_norm_elementwise_affine", True),
        final_norm=before and not fields.flag("_remove_final_layer_norm"),
        activation=fields.activation("activation_function", "relu"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


OPT = Family("opt", ("OPTForCausalLM",), _config, _tensors, "model.decoder.layers.{}.", base="model.")
