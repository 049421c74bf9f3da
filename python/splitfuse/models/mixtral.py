"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig, MoeConfig
from . import llama
from .family import Family, Fields


def _config(fields: Fields) -> ModelConfig:
    result = llama.config(fields, kv_heads=8, longest=131072, theta=1e6)
    result.norm_eps = fields.number("rms_norm_eps", 1e-5)
    result.moe = MoeConfig(
        experts=fields.integer("num_local_experts", 8),
        top_k=fields.integer("num_experts_per_tok", 2),
        intermediate_size=result.intermediate_size,
        normalize=True,
    )
    layer = LayerConfig(window=fields.integer("sliding_window", 0), moe=True)
    result.layers = [layer] * result.num_layers
    return result


MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    _config,
    {
        **llama.TENSORS,
        "moe.router": "block_sparse_moe.gate",
        "moe.expert.gate": "block_sparse_moe.experts.{}.w1",
        "moe.expert.up": "block_sparse_moe.experts.{}.w3",
        "moe.expert.down": "block_sparse_moe.experts.{}.w2",
    },
)
