"""StarCoder2: Llama with layer norms, a plain MLP and biases."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig
from . import llama
from .family import Family, Fields
from .rope import rope


def _config(fields: Fields) -> ModelConfig:
    hidden, heads = fields.integer("hidden_size"), fields.heads()
    head_dim = fields.head_dim(hidden, heads)
    bias = fields.flag("use_bias", True)
    result = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.layers(),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", 2),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        max_position=fields.integer("max_position_embeddings", 4096),
        ropes=[rope(fields, head_dim)],
        norm="layer",
        norm_bias=True,
        norm_eps=fields.number("norm_epsilon", 1e-5),
        activation=fields.activation(default="gelu_pytorch_tanh"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )
    if window := fields.integer("sliding_window", 0):
        result.layers = [LayerConfig(window=window)] * result.num_layers
    return result


STARCODER2 = Family(
    "starcoder2",
    ("Starcoder2ForCausalLM",),
    _config,
    {**llama.TENSORS, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
)
