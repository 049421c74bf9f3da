"""SmolLM3: Llama with some layers that have no RoPE."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig
from . import llama
from .family import Family, Fields


def _config(fields: Fields) -> ModelConfig:
    result = llama.config(fields, kv_heads=4, longest=32768, theta=2e6)
    result.tie_embeddings = fields.flag("tie_word_embeddings", True)
    every = fields.integer("no_rope_layer_interval", 4, low=1)
    rotated = fields.integers("no_rope_layers") or [
        int((i + 1) % every != 0) for i in range(result.num_layers)
    ]
    if len(rotated) != result.num_layers or not set(rotated) <= {0, 1}:
        raise fields.error(f"no_rope_layers: expected 0 or 1 for each of {result.num_layers} layers")
    window = fields.integer("sliding_window", 0) if fields.flag("use_sliding_window") else 0
    kinds = fields.words("layer_types") or [
        "sliding_attention" if window and not has else "full_attention" for has in rotated
    ]
    windows = [layer.window for layer in llama.windows(fields, result.num_layers, kinds)]
    result.layers = [
        LayerConfig(window=window, rope=0 if has else -1)
        for window, has in zip(windows, rotated, strict=True)
    ]
    return result


SMOLLM3 = Family("smollm3", ("SmolLM3ForCausalLM",), _config, llama.TENSORS)
