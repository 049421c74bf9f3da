"""Tiny random models of every family, as checkpoints that transformers wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Shapes that hide no mistake: odd widths and heads, a vocabulary that is no multiple of 16, layers of every kind.
SHAPE = {
    "vocab_size": 261,
    "hidden_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Tiny:
    """One kind of model: transformers' name of the type, and fields beside SHAPE (None: without that of SHAPE).

    `rewrite(state, config)` turns the state and config.json into another family's, where transformers has only an
    equal model of another name; the reference stays transformers' own.
    """

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    rewrite: (
        Callable[[dict[str, torch.Tensor], dict[str, Any]], tuple[dict[str, torch.Tensor], dict[str, Any]]]
        | None
    ) = None
    tokens: int = 150  # of the prompt that is compared


def build(tiny: Tiny, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    fields = {**SHAPE, **tiny.fields}
    fields = {key: value for key, value in fields.items() if value is not None or key not in SHAPE}
    config = AutoConfig.for_model(tiny.model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide mistakes
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if name.endswith("weight") and parameter.mean() > 0.5 else 0.0
                parameter.normal_(mean=centre, std=0.1)
            else:
                parameter.normal_(std=0.9 / math.sqrt(parameter.shape[-1]))
    return model.eval()


def save(tiny: Tiny, directory: Path, seed: int = 0) -> Path:
    """Writes the checkpoint to `directory`, and the reference's, if it is another one, to `directory`/reference.
    Returns where the reference lies."""
    from safetensors.torch import load_file, save_file

    model = build(tiny, seed)
    if tiny.rewrite is None:
        model.save_pretrained(directory)
        return directory
    reference = directory / "reference"
    model.save_pretrained(reference)
    config = json.loads((reference / "config.json").read_text())
    state, config = tiny.rewrite(load_file(reference / "model.safetensors"), config)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return reference
