"""EXAONE 4: norms after attention and MLP, norms of queries and keys, and no RoPE in layers without a window."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig
from . import llama, olmo2, qwen
from .family import Family, Fields


def _config(fields: Fields) -> ModelConfig:
    result = llama.config(fields)
    result.norm_eps = fields.number("rms_norm_eps", 1e-5)
    result.norm_place, result.qk_norm = "post", "head"
    window = fields.get("sliding_window")
    kinds = fields.words("layer_types") or _kinds(fields, result.num_layers)
    if window is None:
        return result
    layers = llama.windows(fields, result.num_layers, kinds)
    result.layers = [LayerConfig(window=layer.window, rope=0 if layer.window else -1) for layer in layers]
    return result


def _kinds(fields: Fields, layers: int) -> list[str]:
    pattern = fields.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):  # of letters: L has a window, G has none
        local = [pattern[i % len(pattern)] == "L" for i in range(layers)]
    else:
        every = fields.integer("sliding_window_pattern", 4)
        local = [(i + 1) % every != 0 for i in range(layers)]
    return ["sliding_attention" if has else "full_attention" for has in local]


EXAONE4 = Family("exaone4", ("Exaone4ForCausalLM",), _config, {**olmo2.TENSORS, **qwen.QK_NORMS})
