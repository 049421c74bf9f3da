"""LoRA adapters merged at load, against transformers with the same products added."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from splitfuse import CheckpointError, ConfigError, loader
from tiny_models import Tiny, build

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj", "down_proj"],
}
TARGETS = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., tuple[Path, Path, torch.nn.Module]]:
    """(model, adapter, the model of transformers with the adapter merged); fields of the adapter's configuration."""

    def make(
        kind: str = "llama",
        targets: tuple[str, ...] = TARGETS,
        base: str = "model.layers",
        tiny: dict[str, Any] | None = None,
        **fields: Any,
    ) -> tuple[Path, Path, torch.nn.Module]:
        config = {**CONFIG, **fields}
        model = build(Tiny(kind, tiny or {}))
        model.save_pretrained(tmp_path / "model")
        state: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(4)
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        for layer in range(3):
            for target in targets:
                name = f"{base}.{layer}.{target}"
                weight = model.get_submodule(name).weight
                down = torch.randn(config["r"], weight.shape[1], generator=generator) * 0.2
                up = torch.randn(weight.shape[0], config["r"], generator=generator) * 0.2
                state[f"base_model.model.{name}.lora_A.weight"] = down
                state[f"base_model.model.{name}.lora_B.weight"] = up
                weight.data += scale * up @ down
        (tmp_path / "adapter").mkdir()
        save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path / "model", tmp_path / "adapter", model

    return make


@pytest.mark.parametrize(
    ("kind", "targets", "fields"),
    [
        ("llama", TARGETS, {}),
        ("llama", TARGETS, {"r": 7, "lora_alpha": 3, "use_rslora": True}),
        ("phi3", ("self_attn.qkv_proj",), {}),
    ],
    ids=["llama", "rslora", "a part of a fused matrix"],
)
def test_the_matrices_are_merged(
    adapter: Callable[..., tuple[Path, Path, torch.nn.Module]],
    kind: str,
    targets: tuple[str, ...],
    fields: dict[str, Any],
) -> None:
    path, lora, model = adapter(kind, targets, **fields)
    loaded = loader.load(path, lora=lora)
    model.save_pretrained(path.parent / "merged")
    truth = loader.load(path.parent / "merged")
    plain = loader.load(path)
    changed = 0
    for name in truth.weights.names():
        expected = truth.weights.read(name)
        np.testing.assert_allclose(loaded.weights.read(name), expected, rtol=1e-5, atol=1e-6)
        changed += not np.array_equal(plain.weights.read(name), expected)
    assert changed == 3 * (2 if kind == "llama" else 3)


def test_patterns_of_alpha_are_regular_expressions(
    adapter: Callable[..., tuple[Path, Path, torch.nn.Module]],
) -> None:
    path, lora, _ = adapter(alpha_pattern={r"model\.layers\.[01]\.self_attn\.q_proj": 64})
    plain = loader.load(path)
    merged = loader.load(path, lora=lora)
    state = load_file(lora / "adapter_model.safetensors")
    for layer, factor in ((0, 16.0), (1, 16.0), (2, 2.0)):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        product = (state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"]).numpy()
        name = f"layers.{layer}.attn.q.weight"
        change = merged.weights.read(name) - plain.weights.read(name)
        np.testing.assert_allclose(change, factor * product, rtol=1e-4, atol=1e-4)


def test_files_may_leave_out_the_beginning_of_names(
    adapter: Callable[..., tuple[Path, Path, torch.nn.Module]],
) -> None:
    """As bloom's and opt's do; adapters name the layers in full."""
    fields = {"num_key_value_heads": None, "intermediate_size": None, "n_head": 6, "n_layer": 3}
    path, lora, model = adapter("bloom", ("self_attention.dense",), base="transformer.h", tiny=fields)
    model.save_pretrained(path.parent / "merged")
    truth = loader.load(path.parent / "merged")
    state = load_file(path / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    save_file(short, path / "model.safetensors")
    loaded = loader.load(path, lora=lora)
    for name in truth.weights.names():
        np.testing.assert_allclose(loaded.weights.read(name), truth.weights.read(name), rtol=1e-5, atol=1e-6)


def test_a_tied_head_is_not_changed_in_silence(
    adapter: Callable[..., tuple[Path, Path, torch.nn.Module]],
) -> None:
    path, lora, _ = adapter(tiny={"tie_word_embeddings": True})
    file = lora / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 144)
    state["base_model.model.lm_head.lora_B.weight"] = torch.ones(261, 4)
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"lm_head.*lacks, or ties to another"):
        loader.load(path, lora=lora)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ],
)
def test_what_cannot_be_merged_is_named(
    adapter: Callable[..., tuple[Path, Path, torch.nn.Module]], fields: dict[str, Any], message: str
) -> None:
    path, lora, _ = adapter(**fields)
    with pytest.raises(ConfigError) as error:
        loader.load(path, lora=lora)
    assert message in str(error.value)
    assert "adapter_config.json" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(next(k for k in s if "lora_B" in k)), "has no counterpart"),
        (
            lambda s: s.update({k: v[:, :-1].contiguous() for k, v in s.items() if "q_proj.lora_A" in k}),
            "has shape",
        ),
        (
            lambda s: s.update(
                {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 4)}
            ),
            "a matrix that the model lacks",
        ),
        (
            lambda s: s.update({"base_model.model.lm_head.weight": torch.ones(4, 4)}),
            "is not one of a LoRA adapter",
        ),
        (lambda s: s.clear(), "holds no tensors"),
    ],
    ids=["half", "shape", "unknown", "foreign", "empty"],
)
def test_a_damaged_adapter_is_named(
    adapter: Callable[..., tuple[Path, Path, torch.nn.Module]],
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
) -> None:
    path, lora, _ = adapter()
    file = lora / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(CheckpointError) as error:
        loader.load(path, lora=lora)
    assert message in str(error.value)


def test_only_hugging_face_files_take_an_adapter(
    adapter: Callable[..., tuple[Path, Path, torch.nn.Module]],
) -> None:
    path, lora, _ = adapter()
    loader.load(path).save(path.parent / "converted")
    with pytest.raises(
        ConfigError, match="a LoRA adapter can be merged into a model of Hugging Face files alone"
    ):
        loader.load(path.parent / "converted", lora=lora)
