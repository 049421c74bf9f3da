"""Rotary embeddings in GGUF files, as the `rope_parameters` of a config.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._core import ConfigError, ModelConfig
from .gguf_file import GgufFile
from .gguf_keys import Keys

FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_KINDS = ("none", "linear", "yarn", "longrope")


def parameters(keys: Keys, head_dim: int, partial: bool) -> dict[str, Any]:
    """`partial`: whether a part of a head may be rotated. Raises ConfigError, naming the key, on what is not
    supported."""
    rotated = keys.integer("rope.dimension_count", head_dim)
    if rotated > head_dim or (rotated != head_dim and not partial):
        raise keys.error("rope.dimension_count", f"is {rotated}; a head has {head_dim} dimensions")
    theta = keys.number("rope.freq_base", 10000.0)
    if not theta > 1:
        raise keys.error("rope.freq_base", f"is {theta}; expected a number above 1")
    values: dict[str, Any] = {
        "rope_theta": theta,
        # A share that is rounded down by a hair would lose a dimension.
        "partial_rotary_factor": 1.0 if rotated == head_dim else (rotated + 0.25) / head_dim,
    }
    kind = keys.get("rope.scaling.type", "longrope" if keys.has(LONG_FACTORS) else "linear")
    if kind not in _KINDS:
        raise keys.error("rope.scaling.type", f"is {kind!r}; supported: {', '.join(map(repr, _KINDS))}")
    factor = keys.above_zero("rope.scaling.factor", keys.above_zero("rope.scale_linear", 1.0))
    original = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    if kind == "linear" and factor != 1:
        values |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        values |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        values |= _yarn(keys)
    if kind == "longrope":
        values |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        values["short_factor"], values["long_factor"] = (
            _factors(keys.file, name) for name in (SHORT_FACTORS, LONG_FACTORS)
        )
        if keys.get("rope.scaling.attn_factor") is not None:
            values["attention_factor"] = keys.above_zero("rope.scaling.attn_factor")
    else:
        keys.expect("rope.scaling.attn_factor", 1.0)
    return values


def _yarn(keys: Keys) -> dict[str, float]:
    names = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
    keys.expect("rope.scaling.yarn_ext_factor", 1.0)
    keys.expect("rope.scaling.yarn_log_multiplier", 0.0)
    found = {name: f"rope.scaling.yarn_{key}" for name, key in names.items()}
    return {name: keys.above_zero(key) for name, key in found.items() if keys.get(key) is not None}


def divide(file: GgufFile, config: ModelConfig) -> None:
    """Applies the file's table of divisors, as Llama 3.1's rule gave them, if it has one."""
    if FREQUENCY_FACTORS not in file.tensors:
        return
    ropes = config.ropes
    for rope in ropes:
        frequencies = np.array(rope.inv_freq, dtype=np.float32)
        factors = np.array(_factors(file, FREQUENCY_FACTORS), dtype=np.float32)
        if len(factors) != len(frequencies) or not ((factors > 0) & np.isfinite(factors)).all():
            raise ConfigError(
                f"{file.path}: {FREQUENCY_FACTORS} does not hold {len(frequencies)} numbers above 0"
            )
        rope.inv_freq = (frequencies / factors).tolist()
    config.ropes = ropes


def _factors(file: GgufFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise ConfigError(f"{file.path}: tensor {name!r} is missing")
    values: list[float] = file.read(file.tensors[name]).astype(np.float32).reshape(-1).tolist()
    return values
