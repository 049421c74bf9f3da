"""What `config.json` means, in today's spelling and in older ones, and the refusal of what is not
supported."""

import json

import numpy as np
import pytest

from splitfuse import ConfigError
from splitfuse.models import family_of, supported_architectures
from splitfuse.models.family import Fields


def read_config(raw):
    return family_of(raw, "config.json").read(Fields(raw, "config.json"))


LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA31 = {
    **LLAMA2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
SMOLLM2 = {
    **LLAMA2,
    "bos_token_id": 1,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "vocab_size": 49152,
}
LINEAR = {**LLAMA2, "rope_scaling": {"type": "linear", "factor": 4.0}}
WIDE_HEADS = {**LLAMA2, "hidden_size": 1024, "head_dim": 64, "num_key_value_heads": None}
KNOWN = {"llama2": LLAMA2, "llama31": LLAMA31, "smollm2": SMOLLM2, "linear": LINEAR, "wide heads": WIDE_HEADS}


@pytest.mark.parametrize("raw", KNOWN.values(), ids=KNOWN)
def test_a_config_means_what_transformers_reads_in_it(raw, tmp_path):
    """As it was written years ago, and as today's transformers writes it again."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    reference = LlamaConfig(**{key: value for key, value in raw.items() if key != "transformers_version"})
    reference.architectures = raw["architectures"]
    reference.save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten
    assert "rope_theta" not in rewritten
    old, new = read_config(raw), read_config(rewritten)
    assert old.to_json() == new.to_json()
    expected = {
        "vocab_size": reference.vocab_size,
        "hidden_size": reference.hidden_size,
        "num_layers": reference.num_hidden_layers,
        "num_heads": reference.num_attention_heads,
        "num_kv_heads": reference.num_key_value_heads,
        "head_dim": reference.head_dim,
        "intermediate_size": reference.intermediate_size,
        "max_position": reference.max_position_embeddings,
        "norm_eps": pytest.approx(reference.rms_norm_eps),
        "tie_embeddings": reference.tie_word_embeddings,
        "qkv_bias": reference.attention_bias,
        "o_bias": reference.attention_bias,
        "mlp_bias": reference.mlp_bias,
        "eos_token_ids": np.atleast_1d(reference.eos_token_id).tolist(),
    }
    assert {name: getattr(old, name) for name in expected} == expected
    assert (old.norm, old.norm_place, old.activation, old.gated) == ("rms", "pre", "silu", True)
    assert (old.layers, old.moe.experts, old.qk_norm, old.parallel) == ([], 0, "none", "none")
    [rope] = old.ropes
    np.testing.assert_allclose(rope.inv_freq, LlamaRotaryEmbedding(reference).inv_freq, rtol=2e-7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*supported: .*LlamaForCausalLM"),
        ({"architectures": None}, "not named"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope is not supported; supported: default"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"layer_types": 7}, "layer_types is 7"),
        ({"layer_types": [["full_attention"]]}, "layer_types"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5"),
        ({"vocab_size": "32000"}, "vocab_size is '32000'"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 31, "num_key_value_heads": 31}, "num_attention_heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, True]}, "eos_token_id"),
    ],
)
def test_a_field_that_is_not_supported_is_named(change, named):
    with pytest.raises(ConfigError, match=named) as caught:
        read_config({**LLAMA2, **change})
    assert "\n" not in str(caught.value)


def test_neutral_values_of_unsupported_fields_are_fine():
    neutral = {
        "sliding_window": None,
        "layer_types": ["full_attention"] * 32,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "use_sliding_window": False,
        "pretraining_tp": 2,
        "rope_scaling": {"rope_type": "default"},
        "head_dim": None,
    }
    assert read_config({**LLAMA2, **neutral}).to_json() == read_config(LLAMA2).to_json()


# Of models whose code lies beside their weights: it is never run.
REMOTE = {"InternLM2ForCausalLM", "MiniCPMForCausalLM", "QWenLMHeadModel"}


def test_architectures_are_classes_of_transformers_or_known_beside_it():
    import transformers

    names = supported_architectures()
    assert len(set(names)) == len(names) > 30
    assert {name for name in names if not hasattr(transformers, name)} <= REMOTE
