"""Qwen2-MoE and Qwen3-MoE: experts in most layers, in Qwen2-MoE with one that all tokens have."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig, MoeConfig
from . import llama, qwen
from .family import Family, Fields, Names

EXPERTS: Names = {
    "moe.router": "mlp.gate",
    "moe.expert.gate": "mlp.experts.{}.gate_proj",
    "moe.expert.up": "mlp.experts.{}.up_proj",
    "moe.expert.down": "mlp.experts.{}.down_proj",
}
_SHARED: Names = {
    "moe.shared_gate": "mlp.shared_expert_gate",
    "moe.shared.gate": "mlp.shared_expert.gate_proj",
    "moe.shared.up": "mlp.shared_expert.up_proj",
    "moe.shared.down": "mlp.shared_expert.down_proj",
}


def _experts(fields: Fields, result: ModelConfig, shared: int) -> ModelConfig:
    result.moe = MoeConfig(
        experts=fields.integer("num_experts", fields.get("num_local_experts")),
        top_k=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        normalize=fields.flag("norm_topk_prob"),
        shared_intermediate_size=shared,
        shared_gate=shared > 0,
    )
    dense, step = fields.integers("mlp_only_layers"), fields.integer("decoder_sparse_step", 1, low=1)
    layers = result.layers or [LayerConfig()] * result.num_layers
    result.layers = [
        LayerConfig(
            window=layer.window,
            moe=result.moe.experts > 0 and index not in dense and (index + 1) % step == 0,
        )
        for index, layer in enumerate(layers)
    ]
    return result


def _qwen2(fields: Fields) -> ModelConfig:
    result = llama.config(fields, kv_heads=16, longest=32768)
    result.qkv_bias, result.o_bias = fields.flag("qkv_bias", True), False
    window, first = fields.flag("use_sliding_window"), fields.integer("max_window_layers", 28)
    kinds = fields.words("layer_types") or [
        "sliding_attention" if window and (i + 1) % 2 and i < first else "full_attention"
        for i in range(result.num_layers)
    ]
    fields.get("sliding_window")
    if window:
        result.layers = llama.windows(fields, result.num_layers, kinds, missing=4096)
    return _experts(fields, result, fields.integer("shared_expert_intermediate_size", 5632))


def _qwen3(fields: Fields) -> ModelConfig:
    result = llama.config(fields, kv_heads=4, longest=32768)
    result.qk_norm = "head"
    window = fields.integer("sliding_window", 0, missing=4096)
    if fields.flag("use_sliding_window") and window:
        result.layers = [LayerConfig(window=window)] * result.num_layers
    return _experts(fields, result, 0)


QWEN2_MOE = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), _qwen2, {**llama.TENSORS, **EXPERTS, **_SHARED})
QWEN3_MOE = Family(
    "qwen3_moe", ("Qwen3MoeForCausalLM",), _qwen3, {**llama.TENSORS, **qwen.QK_NORMS, **EXPERTS}
)
