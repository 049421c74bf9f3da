"""Values that nobody means: an error names the field, before anything is made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from splitfuse import ConfigError
from splitfuse._core import ModelConfig
from splitfuse.models import family_of
from splitfuse.models.family import Family, Fields
from test_families_defaults import KNOWN, every_known, whole
from test_families_layer_norm import BLOOM_560M, GPT2, GPT_J_6B
from tiny_models_rms import RMS


def read(raw: dict[str, Any]) -> ModelConfig:
    return family_of(raw, "config.json").read(Fields(raw, "config.json"))


def known(name: str, *left_out: str) -> dict[str, Any]:
    return {key: value for key, value in whole(KNOWN[name]).to_dict().items() if key not in left_out}


def minicpm() -> dict[str, Any]:
    tiny = RMS["minicpm"]
    assert tiny.rewrite is not None
    return tiny.rewrite({}, {**whole(tiny).to_dict(), "num_hidden_layers": 3})[1]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"hidden_act": ["silu"]}),
        ("llama", {"hidden_act": {}}),
        ("llama", {"rope_scaling": "linear"}),
        ("llama", {"rope_parameters": 5}),
        ("llama", {"hidden_size": 0}),
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("gemma2", {"query_pre_attn_scalar": -1}),
        ("gemma3", {"query_pre_attn_scalar": 0}),
        ("gemma3", {"query_pre_attn_scalar": -1}),
        ("gemma3", {"sliding_window_pattern": 0}),
        ("gemma3", {"rope_parameters": 5}),
        ("gemma3", {"rope_parameters": "x"}),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3", {"rope_scaling": "linear"}),
        ("smollm3", {"no_rope_layer_interval": 0}),
        ("smollm3", {"no_rope_layers": 5}),
        ("smollm3", {"no_rope_layers": [[1]] * 5}),
        ("exaone4", {"sliding_window_pattern": 0, "layer_types": None}),
        ("exaone4", {"sliding_window_pattern": "", "layer_types": None}),
        ("exaone4", {"sliding_window_pattern": "LLX", "layer_types": None}),
        ("qwen2_moe", {"mlp_only_layers": 5}),
        ("qwen2_moe", {"mlp_only_layers": "abc"}),
        ("qwen2_moe", {"mlp_only_layers": ["1"]}),
        ("qwen3_moe", {"decoder_sparse_step": 0}),
        ("qwen3_moe", {"decoder_sparse_step": "1"}),
        ("granite", {"logits_scaling": 0}),
        ("phi3", {"lm_head_bias": True}),
        ("phi3", {"full_attn_mod": 2}),
        ("phi3", {"interpolate_factor": 4}),
        ("llama", {"kv_lora_rank": 512}),
        ("llama", {"n_routed_experts": 64}),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(name: str, change: dict[str, Any]) -> None:
    field = next(iter(change))
    with pytest.raises(ConfigError, match=rf"^config.json: {field}"):
        read({**known(name), **change})


def test_a_rope_of_some_layers_that_is_no_object_is_named() -> None:
    with pytest.raises(ConfigError, match="full_attention is 7; expected an object"):
        read({**known("gemma3"), "rope_parameters": {"full_attention": 7}})
    with pytest.raises(ConfigError, match="full_attention is not supported"):
        read({**known("gemma2"), "rope_parameters": {"full_attention": 7}})


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 0}, {"sparse_config": {"kernel_size": 32}}, {"hidden_size": 0}], ids=str
)
def test_wrong_values_of_minicpm_are_named(change: dict[str, Any]) -> None:
    read({**minicpm(), "sparse_config": None})
    with pytest.raises(ConfigError, match=next(iter(change))):
        read({**minicpm(), **change})


@every_known
@pytest.mark.parametrize("count", [0, 4097, 2**30, 2**31 - 1])
def test_counts_are_bounded_before_anything_is_made_of_them(name: str, count: int) -> None:
    raw = known(name)
    for names in (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")):
        [field] = [name for name in names if name in raw]
        with pytest.raises(ConfigError, match=f"{field} is {count}; expected an integer from 1 to 4096"):
            read({**raw, field: count})


@pytest.mark.parametrize("raw", [GPT2, BLOOM_560M, GPT_J_6B], ids=lambda raw: raw["model_type"])
def test_counts_of_older_names_are_bounded(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="n_layer is 4097"):
        read({**raw, "n_layer": 4097})


def test_frequencies_are_bounded() -> None:
    with pytest.raises(ConfigError, match="rotary_dim is 1073741824; expected an even number up to 1024"):
        read({**GPT_J_6B, "n_embd": 2**30, "n_head": 1, "rotary_dim": 2**30})


@pytest.mark.parametrize("error", [ZeroDivisionError, TypeError, AttributeError, KeyError, IndexError])
def test_what_a_family_overlooks_is_an_error_that_names_the_file(error: type[Exception]) -> None:
    def config(fields: Fields) -> ModelConfig:
        raise error("overlooked")

    with pytest.raises(ConfigError, match=r"dir/config.json: not a configuration of odd: .*overlooked"):
        Family("odd", (), config, {}).read(Fields({}, "dir/config.json"))


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("gemma2", "attn_logit_softcapping", {"attention_softcap": 0.0}),
        ("gemma2", "final_logit_softcapping", {"logit_softcap": 0.0}),
        ("mistral, window 40", "sliding_window", {"layers": []}),
        ("mistral, window 40", "num_key_value_heads", {"num_kv_heads": 6}),
        ("smollm3", "num_key_value_heads", {"num_kv_heads": 6}),
        ("exaone4", "sliding_window", {"layers": []}),
        ("qwen2, windows from layer 1, tied", "sliding_window", {"layers": []}),
        ("gpt_oss", "head_dim", {"head_dim": 24}),
        ("glm", "head_dim", {"head_dim": 24}),
        ("falcon, 7b", "multi_query", {"num_kv_heads": 6}),
    ],
)
def test_null_is_none_and_not_the_default(name: str, field: str, expected: dict[str, Any]) -> None:
    config = json.loads(read({**known(name), field: None}).to_json())
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
def test_layers_with_a_window_have_one(name: str) -> None:
    with pytest.raises(ConfigError, match="sliding_window, 0"):
        read({**known(name), "sliding_window": None})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "gelu_tanh"),
        ({"hidden_act": "gelu"}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_act": "silu", "hidden_activation": None}, "silu"),
    ],
)
def test_the_activation_of_the_first_gemma(change: dict[str, Any], expected: str) -> None:
    raw = known("gemma", "hidden_act")
    assert read({**raw, **change}).activation == expected
    theirs = type(whole(KNOWN["gemma"])).from_dict({**raw, **change}).hidden_act
    assert Fields({"hidden_act": theirs}, "").activation() == expected


def test_two_activations_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_activation is 'relu', but hidden_act"):
        read({**known("gemma"), "hidden_activation": "relu"})


def test_gemma3_and_gpt_oss_keep_a_theta_beside_a_scaling() -> None:
    gemma3 = known("gemma3", "rope_parameters")
    ours = read({**gemma3, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    assert ours.ropes == read({**gemma3, "rope_parameters": {"full_attention": full}}).ropes
    gpt_oss = known("gpt_oss")
    parameters = {**gpt_oss.pop("rope_parameters"), "rope_theta": 5e5}
    assert (
        read({**gpt_oss, "rope_theta": 5e5}).ropes == read({**gpt_oss, "rope_parameters": parameters}).ropes
    )
