"""The one forward on models of no family's making: each field of ModelConfig about the stream, the norms and the MLP,
against a float64 forward in numpy. Attention is plain here; its fields have tests of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engines import same_bits
from splitfuse import _core

PROMPT = np.random.default_rng(5).integers(0, 97, 40).tolist()

PLAIN = {
    "vocab_size": 97, "hidden_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "intermediate_size": 57, "max_position": 64, "tie_embeddings": False,
    "ropes": [_core.RopeConfig(inv_freq=[1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003])],
}  # fmt: skip
LAYER = {"norm": "layer", "norm_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt2": {
        **LAYER, "learned_positions": 64, "gated": False, "activation": "gelu_tanh", "mlp_bias": True,
        "qkv_bias": True, "o_bias": True, "tie_embeddings": True,
    },
    "offset": {"learned_positions": 66, "position_offset": 2, "gated": False, "activation": "relu"},
    "layer_without_bias": {"norm": "layer", "gated": False, "activation": "gelu"},
    "post": {"norm_place": "post"},
    "both": {"norm_place": "both", "embed_scale": 6.3, "activation": "gelu_tanh"},
    "residual": {**LAYER, "norm_place": "residual", "embed_norm": True, "final_norm": False},
    "residual_scaled": {"norm_place": "residual", "residual_scale": 0.7},
    "shared": {**LAYER, "parallel": "shared", "gated": False, "activation": "gelu", "lm_head_bias": True},
    "own": {**LAYER, "parallel": "own", "residual_scale": 0.4},
    "scaled": {"residual_scale": 0.22, "logit_scale": 0.3, "embed_scale": 12.0},
    "capped": {"logit_softcap": 2.0, "logit_scale": 1.5},
    "embed_size": {"embed_size": 24, "gated": False, "activation": "relu", "learned_positions": 64},
    "swiglu_clamped": {"activation": "swiglu_clamped", "mlp_bias": True},
    "none": {"gated": False, "activation": "none"},
}  # fmt: skip


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x / 2 * np.vectorize(math.erfc, otypes=[float])(-x / np.sqrt(2)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def make(fields: dict[str, Any]) -> tuple[_core.ModelConfig, dict[str, np.ndarray]]:
    config = _core.ModelConfig(**{**PLAIN, **fields})
    rng = np.random.default_rng(1)
    weights = {}
    for name, shape in _core.canonical_names(config):
        size = 1.0 if len(shape) == 1 else 2.0 / math.sqrt(shape[-1])
        values = rng.standard_normal(shape) * size + ("norm.weight" in name)
        weights[name] = values.astype(np.float32)
    return config, weights


class Truth:
    """The forward of one sequence in float64."""

    def __init__(self, config: _core.ModelConfig, weights: dict[str, np.ndarray]) -> None:
        self.c, self.w = config, {name: value.astype(np.float64) for name, value in weights.items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if f"{name}.weight" not in self.w:
            return x
        centered = x - x.mean(-1, keepdims=True) if self.c.norm == "layer" else x
        unit = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + self.c.norm_eps)
        return unit * self.w[f"{name}.weight"] + self.w.get(f"{name}.bias", 0.0)

    def attention(self, name: str, x: np.ndarray) -> np.ndarray:
        c, rows = self.c, len(x)
        q, k, v = (self.linear(f"{name}.{part}", x).reshape(rows, -1, c.head_dim) for part in "qkv")
        angles = np.arange(rows)[:, None, None] * np.array(c.ropes[0].inv_freq)
        q, k = (
            np.concatenate(
                [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1
            )
            for a, b in (np.split(part, 2, -1) for part in (q, k))
        )
        k, v = (np.repeat(part, c.num_heads // c.num_kv_heads, 1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim)
        scores = np.where(np.tri(rows, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v).reshape(rows, -1)
        return self.linear(f"{name}.o", out)

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        up = self.linear(f"{name}.up", x)
        if self.c.activation == "swiglu_clamped":
            gate = np.minimum(self.linear(f"{name}.gate", x), 7)
            up = gate * sigmoid(1.702 * gate) * (np.clip(up, -7, 7) + 1)
        elif self.c.gated:
            up = ACT[self.c.activation](self.linear(f"{name}.gate", x)) * up
        else:
            up = ACT[self.c.activation](up)
        return self.linear(f"{name}.down", up)

    def add(self, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        scale = self.c.residual_scale
        if self.c.norm_place == "residual":
            return self.norm(name, x + scale * y)
        return x + scale * self.norm(name, y)

    def layer(self, at: str, x: np.ndarray) -> np.ndarray:
        first = self.norm(f"{at}.attn_norm", x)
        attended = self.add(f"{at}.attn_post_norm", x, self.attention(f"{at}.attn", first))
        if self.c.parallel == "shared":
            second = first
        else:
            second = self.norm(f"{at}.mlp_norm", attended if self.c.parallel == "none" else x)
        return self.add(f"{at}.mlp_post_norm", attended, self.mlp(f"{at}.mlp", second))

    def logits(self, tokens: list[int]) -> np.ndarray:
        c = self.c
        x = self.w["embed.weight"][tokens] * c.embed_scale
        if c.embed_size:
            x = self.linear("embed_in", x)
        if c.learned_positions:
            x = x + self.w["embed_positions.weight"][c.position_offset :][: len(tokens)]
        x = self.norm("embed_norm", x)
        for i in range(c.num_layers):
            x = self.layer(f"layers.{i}", x)
        x = self.norm("final_norm", x)
        if c.embed_size:
            x = self.linear("embed_out", x)
        logits = self.linear("embed" if c.tie_embeddings else "lm_head", x) * c.logit_scale
        return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def forward(config: _core.ModelConfig, weights: dict[str, np.ndarray], **engine: Any) -> np.ndarray:
    """[tokens of PROMPT, vocab]"""
    fields = {"dtype": "float32", "threads": 1, "kv_bytes": 1 << 20, "token_budget": 64, "max_model_len": 64}
    source = _core.callback_source(list(weights), lambda name: weights[name])
    made, probe = _core.testing.probed_engine(config, source, _core.EngineConfig(**{**fields, **engine}))
    probe.capture = True
    made.put(0, PROMPT, _core.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    while made.has_work():
        made.step()
    rows = dict(probe.take())
    return np.stack([rows[position] for position in sorted(rows)])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_float64(name: str) -> None:
    config, weights = make(MODELS[name])
    truth = Truth(config, weights).logits(PROMPT)
    out = forward(config, weights)
    assert out.shape == truth.shape
    assert np.abs(out - truth).max() <= 2e-4 * np.abs(truth).max()


@pytest.mark.parametrize("name", MODELS)
def test_splitting_changes_no_bit(name: str) -> None:
    config, weights = make(MODELS[name])
    for dtype, quantize in [("bfloat16", "dense"), ("bfloat16", "int8"), ("float32", "int4")]:
        how = {"dtype": dtype, "quantize": quantize}
        whole = forward(config, weights, **how)
        assert np.isfinite(whole).all()
        assert same_bits(whole, forward(config, weights, token_budget=7, threads=2, **how))
