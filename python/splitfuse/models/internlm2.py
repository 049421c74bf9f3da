"""InternLM2: Llama with queries, keys and values of each group of heads together in one matrix."""

from __future__ import annotations

from .._core import ModelConfig
from . import llama
from .family import Family, Fields, Part
from .parts import of_group


def _config(fields: Fields) -> ModelConfig:
    result = llama.config(fields)
    result.qkv_bias = result.o_bias = fields.flag("bias")
    return result


INTERNLM2 = Family(
    "internlm2",
    ("InternLM2ForCausalLM",),
    _config,
    {
        "embed": "model.tok_embeddings",
        "final_norm": "model.norm",
        "lm_head": "output",
        "attn_norm": "attention_norm",
        "attn.q": Part("attention.wqkv", of_group(0)),
        "attn.k": Part("attention.wqkv", of_group(1)),
        "attn.v": Part("attention.wqkv", of_group(2)),
        "attn.o": "attention.wo",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "feed_forward.w1",
        "mlp.up": "feed_forward.w3",
        "mlp.down": "feed_forward.w2",
    },
    harmless=("rotary_emb.inv_freq",),
)
