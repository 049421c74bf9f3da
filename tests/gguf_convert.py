"""Hugging Face checkpoints written as GGUF files, the way llama.cpp's converter lays out metadata and tensors. Names of
tensors are those of the gguf package's own table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from test_gguf import add_tensor, add_value, interleaved

State = dict[str, np.ndarray]
Config = dict[str, Any]
_ARCH = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
PAIRS = ("llama", "minicpm", "granite", "smollm3")  # whose queries and keys the converter turns into pairs
_ONE_MORE = ("gemma", "gemma2", "gemma3")
_LAYER_NORM = ("gpt2", "gptneox", "gptj", "bloom", "falcon", "phi2", "stablelm", "starcoder", "starcoder2",
               "command-r", "cohere2")  # fmt: skip


def first(config: Config, *names: str, default: Any = None) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), default)


def shape_of(config: Config) -> tuple[int, int, int, int, int]:
    """hidden, layers, heads, key heads, width of a head"""
    hidden = first(config, "hidden_size", "n_embd", "n_embed")
    heads = first(config, "num_attention_heads", "n_head")
    layers = first(config, "num_hidden_layers", "n_layer")
    if config["model_type"] == "gpt_bigcode":
        kv_heads = 1
    elif config["model_type"] == "falcon":
        kv_heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    else:
        kv_heads = first(config, "num_key_value_heads", default=heads)
    return hidden, layers, heads, kv_heads, first(config, "head_dim", default=hidden // heads)


# Metadata


def metadata(arch: str, config: Config) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, head_dim = shape_of(config)
    norm = "layer_norm" if arch in _LAYER_NORM else "layer_norm_rms"
    eps = first(config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    lengths = () if arch == "bloom" else ("max_position_embeddings", "n_positions", "seq_length")
    values = {
        "context_length": first(config, *lengths, default=2048),
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": first(
            config, "intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hidden
        ),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        f"attention.{norm}_epsilon": float(eps),
        **_rope(arch, config, head_dim),
        **_MORE.get(arch, lambda config: {})(config),
    }
    if config.get("head_dim") is not None and arch != "granite":
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return {f"{arch}.{key}": value for key, value in values.items()}


def _rope(arch: str, config: Config, head_dim: int) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    theta = first(rope, "rope_theta", default=first(config, "rotary_emb_base", "rope_theta", default=10000.0))
    share = first(rope, "partial_rotary_factor", default=1.0)
    if arch in ("gpt2", "bloom", "starcoder"):
        return {}
    if arch == "gptj":
        return {"rope.dimension_count": config["rotary_dim"]}
    values: dict[str, Any] = {
        "rope.freq_base": float(theta),
        "rope.dimension_count": int(head_dim * share),
    }
    kind = rope.get("rope_type", "default")
    if kind == "yarn":
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = float(rope["factor"])
    elif kind == "longrope":
        values["rope.scaling.type"] = "longrope"
        stretched = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
        by = np.log(stretched) / np.log(rope["original_max_position_embeddings"])
        values["rope.scaling.attn_factor"] = float(np.sqrt(1 + by)) if stretched > 1 else 1.0
    if "original_max_position_embeddings" in rope:
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return values


def _experts(config: Config) -> dict[str, Any]:
    return {
        "expert_count": first(config, "num_experts", "num_local_experts"),
        "expert_used_count": config["num_experts_per_tok"],
    }


def _llama(config: Config) -> dict[str, Any]:
    values = {"vocab_size": config["vocab_size"]}
    return values | _experts(config) if "num_local_experts" in config else values


def _qwen_moe(config: Config) -> dict[str, Any]:
    values = {**_experts(config), "expert_feed_forward_length": config["moe_intermediate_size"]}
    if "shared_expert_intermediate_size" in config:
        values["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return values


def _window(config: Config) -> dict[str, Any]:
    return {"attention.sliding_window": config["sliding_window"] or 0}


def _gemma2(config: Config) -> dict[str, Any]:
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    return {**_window(config), **{name: config[name] for name in names}}


def _cohere(config: Config) -> dict[str, Any]:
    window = _window(config) if "sliding_window" in config else {}
    return {"logit_scale": float(config["logit_scale"]), "rope.scaling.type": "none", **window}


def _exaone4(config: Config) -> dict[str, Any]:
    if config["sliding_window"] is None:
        return {}
    pattern = [kind == "sliding_attention" for kind in config["layer_types"]]
    return {**_window(config), "attention.sliding_window_pattern": pattern}


def _granite(config: Config) -> dict[str, Any]:
    return {
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
    }


def _minicpm(config: Config) -> dict[str, Any]:
    return {
        "embedding_scale": config["scale_emb"],
        "residual_scale": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
        "logit_scale": config["hidden_size"] / config["dim_model_base"],
    }


_MORE: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2moe": _qwen_moe,
    "qwen3moe": _qwen_moe,
    "phi3": _window,
    "gemma2": _gemma2,
    "gemma3": _window,
    "gpt-oss": lambda config: {
        **_window(config),
        **_experts(config),
        "expert_feed_forward_length": config["intermediate_size"],
    },
    "gptneox": lambda config: {"use_parallel_residual": config["use_parallel_residual"]},
    "stablelm": lambda config: {"use_parallel_residual": True},
    "falcon": lambda config: {"tensor_data_layout": "jploski"},
    "command-r": _cohere,
    "cohere2": _cohere,
    "exaone4": _exaone4,
    "granite": _granite,
    "minicpm": _minicpm,
}


# Tensors


def _grouped(tensor: np.ndarray, groups: int, queries: int, dim: int) -> list[np.ndarray]:
    """q, k and v of a matrix whose groups each hold [queries..., k, v]."""
    parts = tensor.reshape(groups, queries + 2, dim, *tensor.shape[1:])
    cuts = (parts[:, :-2], parts[:, -2], parts[:, -1])
    return [cut.reshape(-1, *tensor.shape[1:]) for cut in cuts]


def changed(arch: str, config: Config, name: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """What the converter writes of one tensor."""
    _, _, heads, kv_heads, dim = shape_of(config)
    if arch in PAIRS and ".q_proj." in name:
        return [(name, interleaved(tensor, heads))]
    if arch in PAIRS and ".k_proj." in name:
        return [(name, interleaved(tensor, kv_heads))]
    if arch in _ONE_MORE and name.endswith("norm.weight"):
        return [(name, tensor + np.float32(1))]
    if arch in ("bloom", "gptneox", "falcon") and "query_key_value" in name:
        groups = kv_heads if arch == "falcon" else heads
        return [(name, np.concatenate(_grouped(tensor, groups, heads // groups, dim)))]
    if arch == "internlm2" and "wqkv" in name:
        layer = name.split(".")[2]
        q, k, v = _grouped(tensor, kv_heads, heads // kv_heads, dim)
        parts = {"q": interleaved(q, heads), "k": interleaved(k, kv_heads), "v": v}
        return [(f"blk.{layer}.attn_{part}.weight", rows) for part, rows in parts.items()]
    if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return [(name, tensor.T)]
    if arch == "qwen2moe" and name.endswith("shared_expert_gate.weight"):
        return [(name, tensor.squeeze())]
    if arch == "gpt-oss":
        return _gpt_oss(name, tensor)
    return [(name, tensor)]


def _gpt_oss(name: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if name.endswith("sinks"):
        return [(f"{name}.weight", tensor)]
    kind = "bias" if name.endswith("_bias") else "weight"
    stem = name.removesuffix("_bias")
    if ".experts." not in name:
        return [(name, tensor)]
    if kind == "weight":
        tensor = tensor.swapaxes(-1, -2)
    if stem.endswith("down_proj"):
        return [(f"{stem}.{kind}", tensor)]
    gate, up = (stem.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
    return [(f"{gate}.{kind}", tensor[:, 0::2]), (f"{up}.{kind}", tensor[:, 1::2])]


def stacked(state: State) -> State:
    """Experts, and the norms of StableLM's heads, each in a tensor of its own, as one tensor of all."""
    out: State = {}
    lists: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.(?:experts|norms))\.(\d+)\.(.*)", name)
        if match is None:
            out[name] = tensor
            continue
        stem, rest = match[1].removesuffix(".norms"), match[3]
        lists.setdefault(f"{stem}.{rest}", {})[int(match[2])] = tensor
    for name, parts in lists.items():
        out[name] = np.stack([parts[index] for index in range(len(parts))])
    return out


def tensors(arch: str, config: Config, state: State) -> Iterator[tuple[str, np.ndarray]]:
    names = gguf.get_tensor_name_map(_ARCH[arch], shape_of(config)[1])
    for name, tensor in stacked(state).items():
        if name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue
        if arch == "bloom":
            name = name.removeprefix("transformer.")
        name = name.replace(
            "block_sparse_moe.experts", "feed_forward.experts"
        )  # the converter's word for them
        name = name.replace("model.layers", "layers") if "feed_forward.experts" in name else name
        for new, rows in changed(arch, config, name, tensor):
            found = new if new.startswith("blk.") else names.get_name(new, try_suffixes=(".weight", ".bias"))
            assert found is not None, new
            yield found, rows
    rope = config.get("rope_parameters") or {}
    for which in ("long", "short"):
        if f"{which}_factor" in rope:
            yield f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], dtype=np.float32)


def convert(
    source: Path, path: Path, arch: str, kind: str = "F32", more: dict[str, Any] | None = None
) -> Path:
    """`kind`: of all matrices but routers. `more`: further metadata; None removes a key."""
    config = json.loads((source / "config.json").read_text())
    state = {name: tensor.float().numpy() for name, tensor in load_file(source / "model.safetensors").items()}
    writer = gguf.GGUFWriter(path, arch)
    values = {
        **metadata(arch, config),
        "tokenizer.ggml.eos_token_id": config.get("eos_token_id"),
        **(more or {}),
    }
    for key, value in values.items():
        add_value(writer, key, value)
    for name, tensor in tensors(arch, config, state):
        plain = tensor.ndim < 2 or "ffn_gate_inp" in name or "norm" in name or name.endswith(".bias")
        add_tensor(writer, name, tensor, "F32" if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
