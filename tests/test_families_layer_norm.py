"""What published `config.json` files of families with layer norms mean, and the refusal of what is not supported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from splitfuse import CheckpointError, ConfigError, loader
from splitfuse._core import ModelConfig
from splitfuse.models import family_of
from splitfuse.models.family import Fields
from test_models import checkpoint as checkpoint


def read_config(raw: dict[str, Any]) -> ModelConfig:
    config = family_of(raw, "config.json").read(Fields(raw, "config.json"))
    config.validate()
    return config


OPT_350M = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
FALCON_7B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "use_cache": True,
    "vocab_size": 65024,
}
FALCON_40B = {
    **FALCON_7B,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
PYTHIA_160M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
PHI_2 = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 51200,
}
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}
GPT_J_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 50400,
}
COMMAND_R = {
    "architectures": ["CohereForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "model_max_length": 131072,
    "model_type": "cohere",
    "num_attention_heads": 64,
    "num_hidden_layers": 40,
    "num_key_value_heads": 64,
    "pad_token_id": 0,
    "rope_theta": 8000000.0,
    "use_cache": True,
    "vocab_size": 256000,
}
COMMAND_R7B = {
    "_sliding_window_pattern": 4,
    **COMMAND_R,
    "architectures": ["Cohere2ForCausalLM"],
    "cache_implementation": "hybrid",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "use_qk_norm": False,
}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            OPT_350M,
            {
                "embed_size": 512,
                "intermediate_size": 4096,
                "max_position": 2048,
                "learned_positions": 2050,
                "position_offset": 2,
                "norm_place": "residual",
                "final_norm": False,
                "norm_bias": True,
                "activation": "relu",
                "gated": False,
                "mlp_bias": True,
                "tie_embeddings": True,
                "eos_token_ids": [2],
            },
        ),
        (
            FALCON_7B,
            {
                "num_heads": 71,
                "num_kv_heads": 1,
                "head_dim": 64,
                "intermediate_size": 18176,
                "parallel": "shared",
                "activation": "gelu",
                "qkv_bias": False,
                "alibi_slopes": [],
                "tie_embeddings": True,
            },
        ),
        (FALCON_40B, {"num_kv_heads": 8, "head_dim": 64, "parallel": "own"}),
        (
            GPT2,
            {
                "hidden_size": 768,
                "num_layers": 12,
                "intermediate_size": 3072,
                "max_position": 1024,
                "learned_positions": 1024,
                "position_offset": 0,
                "ropes": [],
                "activation": "gelu_tanh",
                "attention_scale": 0.0,
                "tie_embeddings": True,
            },
        ),
        (
            PYTHIA_160M,
            {"parallel": "own", "activation": "gelu", "qkv_bias": True, "tie_embeddings": False},
        ),
        (
            PHI_2,
            {"head_dim": 80, "parallel": "shared", "lm_head_bias": True, "activation": "gelu_tanh"},
        ),
        (
            BLOOM_560M,
            {
                "hidden_size": 1024,
                "num_layers": 24,
                "num_heads": 16,
                "intermediate_size": 4096,
                "embed_norm": True,
                "activation": "gelu_tanh",
                "tie_embeddings": True,
            },
        ),
        (GPT_J_6B, {"head_dim": 256, "intermediate_size": 16384, "parallel": "shared", "qkv_bias": False}),
        (
            COMMAND_R,
            {
                "max_position": 131072,
                "norm_bias": False,
                "parallel": "shared",
                "logit_scale": 0.0625,
                "tie_embeddings": True,
            },
        ),
        (COMMAND_R7B, {"head_dim": 128, "num_kv_heads": 8, "logit_scale": 0.25, "qk_norm": "none"}),
    ],
    ids=lambda value: value.get("architectures", [""])[0],
)
def test_published_configurations(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    config = read_config(raw)
    assert config.norm == "layer"
    assert config.norm_eps == pytest.approx(1e-5)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("raw", "rotated"), [(FALCON_7B, 64), (PYTHIA_160M, 16), (PHI_2, 32), (GPT_J_6B, 64), (COMMAND_R, 128)]
)
def test_rotated_dimensions(raw: dict[str, Any], rotated: int) -> None:
    (rope,) = read_config(raw).ropes
    assert 2 * len(rope.inv_freq) == rotated
    theta = raw.get("rope_theta", 10000)
    np.testing.assert_allclose(rope.inv_freq, theta ** -(np.arange(0, rotated, 2) / rotated), rtol=1e-6)


def test_a_missing_field_is_the_default_of_its_family() -> None:
    assert 2 * len(read_config({**PYTHIA_160M, "rotary_pct": None}).ropes[0].inv_freq) == 16
    assert 2 * len(read_config({**PHI_2, "partial_rotary_factor": None}).ropes[0].inv_freq) == 40
    command_r = read_config({**COMMAND_R, "rope_theta": None, "logit_scale": None})
    assert command_r.ropes[0].inv_freq[1] == pytest.approx(500000 ** (-2 / 128))
    assert command_r.logit_scale == 0.0625
    without = {name: value for name, value in COMMAND_R7B.items() if name != "sliding_window"}
    windows = [layer.window for layer in read_config(without).layers]
    assert windows == [4096, 4096, 4096, 0] * 8


def test_only_layers_with_a_window_are_rotated() -> None:
    layers = read_config(COMMAND_R7B).layers
    assert [layer.rope for layer in layers] == [0, 0, 0, -1] * 8
    kinds = ["full_attention", "sliding_attention"] * 16
    assert [layer.rope for layer in read_config({**COMMAND_R7B, "layer_types": kinds}).layers] == [-1, 0] * 16


def test_alibi_slopes() -> None:
    """As the paper has them, and for a number of heads that is no power of 2."""
    slopes = read_config(BLOOM_560M).alibi_slopes
    np.testing.assert_allclose(slopes, [2 ** (-0.5 * i) for i in range(1, 17)], rtol=1e-6)
    six = read_config({**BLOOM_560M, "num_attention_heads": 6, "n_embed": 96}).alibi_slopes
    np.testing.assert_allclose(six, [2.0**-i for i in (2, 4, 6, 8, 1, 3)], rtol=1e-6)


def test_slopes_of_falcon_are_bfloat16_before_they_are_scaled() -> None:
    import torch

    fields = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    config = read_config({**FALCON_7B, **fields, "hidden_size": 2048, "num_attention_heads": 32})
    assert (config.num_kv_heads, config.parallel, config.ropes) == (32, "none", [])
    powers = torch.tensor([2 ** (-0.25 * i) for i in range(1, 33)])
    np.testing.assert_array_equal(config.alibi_slopes, (powers.bfloat16().float() / 8).numpy())


@pytest.mark.parametrize(
    ("raw", "change", "named"),
    [
        (OPT_350M, {"activation_function": "tanh"}, "activation_function is 'tanh'"),
        (FALCON_40B, {"parallel_attn": None}, "parallel_attn is None"),
        (FALCON_40B, {"parallel_attn": False}, "parallel_attn is False"),
        (FALCON_40B, {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        (FALCON_7B, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
        (BLOOM_560M, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post"),
        (BLOOM_560M, {"slow_but_exact": True}, "slow_but_exact"),
        (BLOOM_560M, {"n_layer": None}, "n_layer is missing"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT_J_6B, {"rotary_dim": 65}, "rotary_dim is 65"),
        (GPT_J_6B, {"rotary_dim": None}, "rotary_dim is missing or null"),
        (GPT_J_6B, {"rotary_dim": 258}, "rotary_dim is 258"),
        (GPT_J_6B, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (PHI_2, {"qk_layernorm": True}, "qk_layernorm"),
        (PHI_2, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (COMMAND_R7B, {"use_qk_norm": True}, "use_qk_norm"),
        (COMMAND_R7B, {"sliding_window": None}, "sliding_window, 0"),
        (COMMAND_R7B, {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        (COMMAND_R7B, {"layer_types": ["chunked_attention"] * 32}, "layer_types"),
    ],
)
def test_a_field_that_is_not_supported_is_named(
    raw: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config({**raw, **change})


def test_a_head_whose_norm_is_missing_is_named(checkpoint: Any, tmp_path: Any) -> None:
    from safetensors.numpy import load_file, save_file

    path, _ = checkpoint("stablelm, norms of heads")
    state = load_file(path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    name = "model.layers.1.self_attn.q_layernorm.norms.4.weight"
    wrong = {**state, name: state[name].astype(np.float16)}
    without = {other: tensor for other, tensor in state.items() if other != name}
    for tensors, said in ((without, "norms.4.weight' is missing"), (wrong, r"gives layers.1.attn.q_norm")):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            loader.load(tmp_path)
