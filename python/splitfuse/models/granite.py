"""Granite and MiniCPM: Llama with scales on embeddings, scores, what is added to the stream, and logits."""

from __future__ import annotations

import math

from .._core import ModelConfig
from . import llama
from .family import Family, Fields


def _granite(fields: Fields) -> ModelConfig:
    result = llama.config(fields)
    result.embed_scale = fields.number("embedding_multiplier", 1.0)
    result.residual_scale = fields.number("residual_multiplier", 1.0)
    result.attention_scale = fields.number("attention_multiplier", 1.0)
    result.logit_scale = 1.0 / fields.positive("logits_scaling", 1.0)
    return result


def _minicpm(fields: Fields) -> ModelConfig:
    result = llama.config(fields)
    result.embed_scale = fields.number("scale_emb", 1.0)
    result.residual_scale = fields.number("scale_depth", 1.0) / math.sqrt(result.num_layers)
    result.logit_scale = fields.number("dim_model_base", 1.0) / result.hidden_size
    result.tie_embeddings = fields.flag("tie_word_embeddings", True)
    return result


GRANITE = Family("granite", ("GraniteForCausalLM",), _granite, llama.TENSORS)
MINICPM = Family("minicpm", ("MiniCPMForCausalLM",), _minicpm, llama.TENSORS)
