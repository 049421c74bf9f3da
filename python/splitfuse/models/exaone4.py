"""EXAONE 4: norms after attention and MLP, norms of queries and keys, and no RoPE in layers without a window."""

from __future__ import annotations

from .._core import LayerConfig, ModelConfig
from . import llama, olmo2, qwen
from .family import Family, Fields


def _config(fields: Fields) -> ModelConfig:
    result = llama.config(fields, kv_heads=32)
    result.norm_eps = fields.number("rms_norm_eps", 1e-5)
    result.norm_place, result.qk_norm = "post", "head"
    kinds = fields.words("layer_types")
    if fields.get("sliding_window", missing=4096) is None:
        return result
    kinds = kinds or _kinds(fields, result.num_layers)
    layers = llama.windows(fields, result.num_layers, kinds, missing=4096)
    result.layers = [LayerConfig(window=layer.window, rope=0 if layer.window else -1) for layer in layers]
    return result


def _kinds(fields: Fields, layers: int) -> list[str]:
    pattern = fields.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):  # of letters: L has a window, G has none
        if not pattern or not set(pattern) <= {"L", "G"}:
            raise fields.error(
                f"sliding_window_pattern is {pattern!r}; expected letters L and G, or a number"
            )
        local = [pattern[i % len(pattern)] == "L" for i in range(layers)]
    else:
        every = fields.integer("sliding_window_pattern", 4, low=1)
        local = [(i + 1) % every != 0 for i in range(layers)]
    return ["sliding_attention" if has else "full_attention" for has in local]


EXAONE4 = Family("exaone4", ("Exaone4ForCausalLM",), _config, {**olmo2.TENSORS, **qwen.QK_NORMS})
