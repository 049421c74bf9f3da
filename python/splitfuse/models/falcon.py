"""Falcon. 7B: attention and MLP read one norm, one key head. 40B and later: groups of heads, one norm or two.
Falcon-RW: ALiBi, one after the other, a key head for each query head."""

from __future__ import annotations

import math
import struct

from .._core import ModelConfig
from . import alibi
from .family import Family, Fields, Names, Part
from .parts import of_group
from .rope import rope

_NORMS: dict[str, Names] = {
    "none": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "shared": {"attn_norm": "input_layernorm"},
    "own": {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"},
}


def _tensors(config: ModelConfig) -> Names:
    return {
        "embed": "transformer.word_embeddings",
        "final_norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "attn.q": Part("self_attention.query_key_value", of_group(0)),
        "attn.k": Part("self_attention.query_key_value", of_group(1)),
        "attn.v": Part("self_attention.query_key_value", of_group(2)),
        "attn.o": "self_attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
        **_NORMS[config.parallel],
    }


def _bfloat16(value: float) -> float:
    """Rounded as the reference rounds slopes, to nearest even."""
    bits = int.from_bytes(struct.pack(">f", value), "big")
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack(">f", bits.to_bytes(4, "big"))[0])


def _parallel(fields: Fields, grouped: bool) -> str:
    parallel, norms = fields.flag("parallel_attn", missing=True), fields.get("num_ln_in_parallel_attn")
    if not grouped:
        fields.expect("num_ln_in_parallel_attn", 1)
        return "shared" if parallel else "none"
    if not parallel:
        raise fields.error(f"parallel_attn is {fields.get('parallel_attn')}; expected True")
    fields.expect("num_ln_in_parallel_attn", 1, 2)
    return "shared" if norms == 1 else "own"


def _config(fields: Fields) -> ModelConfig:
    hidden = fields.integer(fields.which("n_embed", "hidden_size"))
    heads = fields.heads()
    head_dim = fields.head_dim(hidden, heads)
    grouped = fields.flag("new_decoder_architecture")
    one_key = fields.flag("multi_query", missing=True) and not grouped
    kv_heads = fields.integer("num_kv_heads", heads)
    bias = fields.flag("bias")
    result = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=1 if one_key else kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("ffn_hidden_size", 4 * hidden),
        max_position=fields.integer("max_position_embeddings", 2048),
        norm="layer",
        norm_bias=True,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        parallel=_parallel(fields, grouped),
        activation=fields.activation("activation", "gelu"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )
    if fields.flag("alibi"):
        # Unlike BLOOM's, these are added before scores are scaled.
        scale = 1 / math.sqrt(head_dim)
        result.alibi_slopes = [_bfloat16(slope) * scale for slope in alibi.slopes(heads)]
    else:
        result.ropes = [rope(fields, head_dim)]
    return result


FALCON = Family(
    "falcon",
    ("FalconForCausalLM",),
    _config,
    _tensors,
    "transformer.h.{}.",
    harmless=("rotary_emb.inv_freq",),
    base="transformer.",
)
