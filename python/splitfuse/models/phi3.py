"""Phi-3 and Phi-4 mini: Llama with queries, keys and values in one matrix, gate and up in another, and LongRoPE."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig
from . import llama
from .family import Family, Fields, Part
from .parts import gate_rows, k_rows, q_rows, up_rows, v_rows


def _config(fields: Fields) -> ModelConfig:
    result = llama.config(fields, longest=4096, partial=1.0, trained=4096)
    result.norm_eps = fields.number("rms_norm_eps", 1e-5)
    if window := fields.integer("sliding_window", 0):
        result.layers = [LayerConfig(window=window)] * result.num_layers
    return result


PHI3 = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    _config,
    {
        **llama.TENSORS,
        "attn.q": Part("self_attn.qkv_proj", q_rows),
        "attn.k": Part("self_attn.qkv_proj", k_rows),
        "attn.v": Part("self_attn.qkv_proj", v_rows),
        "mlp.gate": Part("mlp.gate_up_proj", gate_rows),
        "mlp.up": Part("mlp.gate_up_proj", up_rows),
    },
    harmless=("rotary_emb.inv_freq",),
)
