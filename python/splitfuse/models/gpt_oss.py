"""GPT-OSS: attention with sinks and alternating windows, experts whose gate and up are clamped."""

from __future__ import annotations

from .._core import ModelConfig, MoeConfig
from . import llama
from .family import Array, Family, Fields, Make, Names, Part
from .rope import rope

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _config(fields: Fields) -> ModelConfig:
    result = llama.config(fields, kv_heads=8, head_dim=64, longest=131072, theta=150000.0)
    result.norm_eps = fields.number("rms_norm_eps", 1e-5)
    result.qkv_bias = result.o_bias = fields.flag("attention_bias", True)
    fields.expect("swiglu_alpha", 1.702)
    fields.expect("swiglu_limit", 7.0)
    fields.expect("hidden_act", "silu")
    if "rope_parameters" not in fields and "rope_scaling" not in fields:
        theta = fields.number("rope_theta", 150000.0)
        result.ropes = [rope(fields, result.head_dim, _YARN, theta=theta)]
    result.activation, result.attention_sinks = "swiglu_clamped", True
    result.moe = MoeConfig(
        experts=fields.integer("num_local_experts", 128),
        top_k=fields.integer("num_experts_per_tok", 4),
        intermediate_size=result.intermediate_size,
        scoring="top_softmax",
        router_bias=True,
        expert_bias=True,
    )
    kinds = fields.words("layer_types") or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(result.num_layers)
    ]
    layers = llama.windows(fields, result.num_layers, kinds, missing=128)
    for layer in layers:
        layer.moe = True
    result.layers = layers
    return result


def _turned(which: slice) -> Make:
    """Of [experts, inputs, outputs], these outputs; a bias is [experts, outputs]."""

    def make(a: Array, c: ModelConfig, e: int) -> Array:
        part: Array = a[e][..., which]
        return part.T

    return make


_gate, _up, _down = _turned(slice(0, None, 2)), _turned(slice(1, None, 2)), _turned(slice(None))
_EXPERTS: Names = {
    "moe.router": "mlp.router",
    "moe.expert.gate.weight": Part("mlp.experts.gate_up_proj", _gate, bare=True),
    "moe.expert.gate.bias": Part("mlp.experts.gate_up_proj_bias", _gate, bare=True),
    "moe.expert.up.weight": Part("mlp.experts.gate_up_proj", _up, bare=True),
    "moe.expert.up.bias": Part("mlp.experts.gate_up_proj_bias", _up, bare=True),
    "moe.expert.down.weight": Part("mlp.experts.down_proj", _down, bare=True),
    "moe.expert.down.bias": Part("mlp.experts.down_proj_bias", _down, bare=True),
}
GPT_OSS = Family(
    "gpt_oss",
    ("GptOssForCausalLM",),
    _config,
    {**llama.TENSORS, **_EXPERTS, "attn.sinks": Part("self_attn.sinks", bare=True)},
)
