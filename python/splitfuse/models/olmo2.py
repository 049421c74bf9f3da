"""OLMo 2: norms after attention and MLP, and of whole rows of queries and keys."""

from __future__ import annotations

from .._core import ModelConfig
from . import llama
from .family import Family, Fields

TENSORS = {
    **{
        name: part
        for name, part in llama.TENSORS.items()
        if not name.endswith("_norm") or name == "final_norm"
    },
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def _config(fields: Fields) -> ModelConfig:
    result = llama.config(fields)
    result.norm_eps = fields.number("rms_norm_eps", 1e-5)
    result.norm_place, result.qk_norm = "post", "row"
    return result


OLMO2 = Family("olmo2", ("Olmo2ForCausalLM",), _config, TENSORS)
