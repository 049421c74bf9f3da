"""Command R: attention and MLP read one norm, neighbours in a head are rotated together, logits are scaled. Command R7B
and Command A: most layers have a window, the others no rotary embedding."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig
from . import llama
from .family import Family, Fields, Names, Part
from .parts import flat, half_split
from .rope import rope

_TENSORS: Names = {
    **llama.TENSORS,
    "attn.q": Part("self_attn.q_proj", half_split()),
    "attn.k": Part("self_attn.k_proj", half_split()),
    "attn.q_norm": Part("self_attn.q_norm", half_split(flat)),
    "attn.k_norm": Part("self_attn.k_norm", half_split(flat)),
}


def _config(fields: Fields, theta: float) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    head_dim = fields.head_dim(hidden, heads)
    longest = fields.integer("max_position_embeddings", 8192)
    bias = fields.flag("attention_bias")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=max(longest, fields.integer("model_max_length", 0)),
        ropes=[rope(fields, head_dim, theta=theta)],
        norm="layer",
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        parallel="shared",
        qkv_bias=bias,
        o_bias=bias,
        activation=fields.activation(default="silu"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        logit_scale=fields.number("logit_scale", 0.0625),
    )


def _cohere(fields: Fields) -> ModelConfig:
    result = _config(fields, 500000.0)
    result.qk_norm = "head" if fields.flag("use_qk_norm") else "none"
    return result


def _cohere2(fields: Fields) -> ModelConfig:
    result = _config(fields, 10000.0)
    kinds = fields.words("layer_types")
    if not kinds:
        period = fields.integer("sliding_window_pattern", 4, low=1)
        full = [(layer + 1) % period == 0 for layer in range(result.num_layers)]
        kinds = ["full_attention" if whole else "sliding_attention" for whole in full]
    layers = llama.windows(fields, result.num_layers, kinds, missing=4096)
    result.layers = [LayerConfig(window=layer.window, rope=0 if layer.window else -1) for layer in layers]
    return result


COHERE = Family("cohere", ("CohereForCausalLM",), _cohere, _TENSORS)
COHERE2 = Family("cohere2", ("Cohere2ForCausalLM",), _cohere2, _TENSORS)
