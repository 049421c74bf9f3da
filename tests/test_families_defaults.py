"""What a file leaves out is what its class in transformers fills in, field by field; null is not the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from splitfuse import ConfigError
from splitfuse.models import family_of, supported_architectures
from splitfuse.models.family import Fields
from test_families import REMOTE
from tiny_models import SHAPE, Tiny
from tiny_models_layer_norm import LAYER_NORM
from tiny_models_rms import RMS

WINDOWS = {"use_sliding_window": True, "sliding_window": 60}
KNOWN: dict[str, Tiny] = {
    **{name: tiny for name, tiny in {**RMS, **LAYER_NORM}.items() if tiny.rewrite is None},
    "qwen2, windows of the class": Tiny("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2_moe, windows": Tiny("qwen2_moe", {**WINDOWS, "max_window_layers": 2}),
    "qwen3_moe, windows": Tiny("qwen3_moe", WINDOWS),
    "smollm3, other intervals": Tiny("smollm3", {"no_rope_layer_interval": 2, "num_hidden_layers": 5}),
}
every_known = pytest.mark.parametrize("name", KNOWN)
# What a class holds beside the model, and what ends an answer, which the tokenizer tells too.
APART = {"architectures", "dtype", "eos_token_id", "model_type", "transformers_version"}


def read(raw: dict[str, Any]) -> str:
    """Our reading, as JSON, or the error's text."""
    raw = {key: value for key, value in raw.items() if key != "eos_token_id"}
    try:
        return family_of(raw, "config.json").read(Fields(raw, "config.json")).to_json()
    except ConfigError as error:
        return str(error)


def whole(tiny: Tiny) -> PreTrainedConfig:
    fields = {key: value for key, value in {**SHAPE, **tiny.fields}.items() if value is not None}
    config = AutoConfig.for_model(tiny.model_type, **fields)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[tiny.model_type]]
    return config


def without_one(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in raw.keys() - APART:
        yield name, {key: value for key, value in raw.items() if key != name}
    rope = raw.get("rope_parameters") or {}
    for name in rope:
        yield name, {**raw, "rope_parameters": {key: value for key, value in rope.items() if key != name}}


@every_known
def test_a_field_that_is_left_out_is_what_the_class_fills_in(name: str) -> None:
    config = whole(KNOWN[name])
    raw, different = config.to_dict(), {}
    for left_out, rest in without_one(raw):
        ours = read(rest)
        if " is missing or null; expected " in ours or " lacks " in ours:
            continue  # refused, which answers nothing wrongly
        theirs = read(type(config).from_dict(rest).to_dict())
        if ours != theirs:
            different[left_out] = (ours, theirs)
    assert not different


def test_these_are_all_families_that_transformers_has() -> None:
    known = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[tiny.model_type] for tiny in KNOWN.values()}
    assert known == set(supported_architectures()) - REMOTE
