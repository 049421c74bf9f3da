"""Quantised checkpoints: each scheme's tensors give the matrices that its definition says, and the model that
transformers runs with these matrices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import Run, random_tokens
from splitfuse import CheckpointError, ConfigError, loader
from tiny_models import Tiny, build

WIDE = {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}
GROUP = 64
State = dict[str, torch.Tensor]
Pack = Callable[[torch.Tensor, np.random.Generator], tuple[State, torch.Tensor]]


def words(codes: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Packs codes along `axis` into words of 32 bits, the first in the lowest bits."""
    codes = np.moveaxis(codes.astype(np.uint64), axis, -1)
    codes = codes.reshape(*codes.shape[:-1], -1, 32 // bits)
    packed = (codes << (np.arange(32 // bits, dtype=np.uint64) * bits)).sum(-1).astype(np.uint32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32))


def drawn(
    n: int, k: int, rng: np.random.Generator, bits: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, k], scales and zeros [n, groups]."""
    groups = k // GROUP
    scales = (0.02 * rng.random((n, groups)) + 0.01).astype(np.float16)
    return rng.integers(0, 2**bits, (n, k)), scales, rng.integers(1, 2**bits - 1, (n, groups))


def truth_of(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> torch.Tensor:
    each = codes.shape[1] // scales.shape[1]
    wide = (codes - np.repeat(zeros, each, 1)) * np.repeat(scales.astype(np.float32), each, 1)
    return torch.from_numpy(wide.astype(np.float32))


def gptq(
    weight: torch.Tensor, rng: np.random.Generator, act_order: bool = False
) -> tuple[State, torch.Tensor]:
    n, k = weight.shape
    codes, scales, zeros = drawn(n, k, rng)
    state = {
        "qweight": words(codes.T, 4, 0),
        "qzeros": words(zeros.T - 1, 4, 1),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.arange(k, dtype=torch.int32) // GROUP,
    }
    if not act_order:
        return state, truth_of(codes, scales, zeros)
    order = rng.permutation(k)
    state["g_idx"] = torch.from_numpy((order // GROUP).astype(np.int32))
    group = order // GROUP
    wide = (codes - zeros[:, group]) * scales.astype(np.float32)[:, group]
    return state, torch.from_numpy(wide.astype(np.float32))


def gptq_by_activation(weight: torch.Tensor, rng: np.random.Generator) -> tuple[State, torch.Tensor]:
    return gptq(weight, rng, act_order=True)


def awq(weight: torch.Tensor, rng: np.random.Generator) -> tuple[State, torch.Tensor]:
    n, k = weight.shape
    codes, scales, zeros = drawn(n, k, rng)

    def packed(values: np.ndarray) -> torch.Tensor:
        """A word holds outputs 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first."""
        return words(
            values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(values), -1), 4, 1
        )

    state = {
        "qweight": packed(codes.T),
        "qzeros": packed(zeros.T),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    return state, truth_of(codes, scales, zeros)


def w4a16(weight: torch.Tensor, rng: np.random.Generator) -> tuple[State, torch.Tensor]:
    n, k = weight.shape
    codes, scales, _ = drawn(n, k, rng)
    state = {
        "weight_packed": words(codes, 4, 1),
        "weight_scale": torch.from_numpy(scales).to(torch.bfloat16),
        "weight_shape": torch.tensor([n, k]),
    }
    used = state["weight_scale"].float().numpy()
    return state, truth_of(codes, used, np.full(scales.shape, 8))


def w4a16_with_zeros(weight: torch.Tensor, rng: np.random.Generator) -> tuple[State, torch.Tensor]:
    n, k = weight.shape
    codes, scales, zeros = drawn(n, k, rng)
    state = {
        "weight_packed": words(codes, 4, 1),
        "weight_scale": torch.from_numpy(scales),
        "weight_zero_point": words(zeros, 4, 0),
        "weight_shape": torch.tensor([n, k]),
    }
    return state, truth_of(codes, scales, zeros)


def w8a8(weight: torch.Tensor, rng: np.random.Generator) -> tuple[State, torch.Tensor]:
    n, k = weight.shape
    codes = torch.from_numpy(rng.integers(-127, 128, (n, k)).astype(np.int8))
    scale = torch.from_numpy((0.001 * rng.random((n, 1)) + 0.0005).astype(np.float32)).bfloat16()
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def fp8_codes(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 20).to(torch.float8_e4m3fn)


def fp8_blocks(weight: torch.Tensor, rng: np.random.Generator) -> tuple[State, torch.Tensor]:
    codes = fp8_codes(weight)
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.from_numpy((rng.random((rows, columns)) * 0.02 + 0.04).astype(np.float32))
    wide = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * wide


def fp8_tensor(weight: torch.Tensor, rng: np.random.Generator) -> tuple[State, torch.Tensor]:
    codes, scale = fp8_codes(weight), torch.tensor(0.05)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(1.0)}, codes.float() * scale


def fp8_rows(weight: torch.Tensor, rng: np.random.Generator) -> tuple[State, torch.Tensor]:
    codes = fp8_codes(weight)
    scale = torch.from_numpy((rng.random((len(weight), 1)) * 0.02 + 0.04).astype(np.float32))
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def ct(kind: str, bits: int, format: str) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "channel"}
    if format == "pack-quantized":
        weights |= {"strategy": "group", "group_size": GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
SCHEMES: dict[
    str, tuple[dict[str, Any], Pack, str]
] = {  # configuration, its tensors, how the engine holds them
    "gptq": (GPTQ, gptq, "int4"),
    "gptq, by activation": ({**GPTQ, "desc_act": True}, gptq_by_activation, "dense"),
    "awq": (AWQ, awq, "int4"),
    "compressed-tensors w4a16": (ct("int", 4, "pack-quantized"), w4a16, "int4"),
    "compressed-tensors w4a16, zeros": (ct("int", 4, "pack-quantized"), w4a16_with_zeros, "int4"),
    "compressed-tensors w8a8": (ct("int", 8, "int-quantized"), w8a8, "int8"),
    "compressed-tensors fp8": (ct("float", 8, "float-quantized"), fp8_rows, "dense"),
    "fp8, blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8_blocks, "dense"),
    "fp8, tensors": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor, "dense"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, torch.nn.Module]]:
    """(the quantised checkpoint, the model of transformers with the matrices that it stands for)"""

    def make(name: str, **config: Any) -> tuple[Path, torch.nn.Module]:
        quantization, pack, _ = SCHEMES[name]
        model = build(Tiny("llama", WIDE))
        rng = np.random.default_rng(11)
        state: State = {}
        for key, tensor in model.state_dict().items():
            if not key.endswith("_proj.weight"):
                state[key] = tensor
                continue
            parts, truth = pack(tensor, rng)
            state |= {key.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
            tensor.copy_(truth)
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        save_file(state, tmp_path / "model.safetensors")
        raw = json.loads((tmp_path / "config.json").read_text())
        raw["quantization_config"] = {**quantization, **config}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return tmp_path, model

    return make


@pytest.mark.parametrize("name", SCHEMES)
def test_matrices_are_what_the_scheme_says(
    checkpoint: Callable[..., tuple[Path, torch.nn.Module]], name: str
) -> None:
    path, model = checkpoint(name)
    loaded = loader.load(path)
    assert loaded.quantize == SCHEMES[name][2]
    for layer in range(3):
        for ours, theirs in (
            ("attn.q", "self_attn.q_proj"),
            ("attn.v", "self_attn.v_proj"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.down", "mlp.down_proj"),
        ):
            truth = model.get_submodule(f"model.layers.{layer}.{theirs}").weight.detach().numpy()
            got = loaded.weights.read(f"layers.{layer}.{ours}.weight")
            np.testing.assert_allclose(got, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_those_of_transformers_with_these_matrices(
    checkpoint: Callable[..., tuple[Path, torch.nn.Module]], name: str
) -> None:
    path, model = checkpoint(name)
    tokens = random_tokens(3, 60)
    with torch.inference_mode():
        truth = model(torch.tensor([tokens])).logits[0].numpy()
    run = Run(path, capture=True)  # an engine that holds them dense
    run.put(0, tokens, max_tokens=1, prompt_logprobs=0)
    run.finish_all()
    logits = np.stack([run.logits[0][position] for position in range(1, len(tokens) + 1)])
    assert (np.abs(logits - truth).max(-1) / np.abs(truth).max(-1)).max() <= 2e-5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gptq",
            {"quant_method": "bitsandbytes"},
            "quant_method is 'bitsandbytes', which is not supported; ",
        ),
        ("gptq", {"bits": 3}, "bits is 3; supported: 2, 4, 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("awq", {"version": "gemv"}, "version is 'gemv'"),
        ("awq", {"zero_point": False}, "zero_point is False"),
        ("compressed-tensors w8a8", {"format": "marlin-24"}, "format is 'marlin-24'"),
        ("compressed-tensors w8a8", {"config_groups": {}}, "config_groups"),
        ("fp8, blocks", {"weight_block_size": [128]}, "weight_block_size is [128]"),
        ("fp8, blocks", {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ("fp8, blocks", {"weight_block_size": ["x", 1]}, "weight_block_size is ['x', 1]"),
        ("fp8, blocks", {"weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
        ("gptq", {"quant_method": ["gptq"]}, "quant_method is ['gptq']"),
        (
            "compressed-tensors w8a8",
            {"transform_config": {"config_groups": {"R4": 1}}},
            "transform_config is",
        ),
        (
            "compressed-tensors w8a8",
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "format is 'sparse-24",
        ),
    ],
)
def test_a_scheme_that_is_not_supported_is_named(
    checkpoint: Callable[..., tuple[Path, torch.nn.Module]], name: str, change: dict[str, Any], message: str
) -> None:
    path, _ = checkpoint(name, **change)
    with pytest.raises(ConfigError) as error:
        loader.load(path)
    assert message in str(error.value)
    assert str(path / "config.json") in str(error.value)


Change = Callable[[State], object]


def short(name: str) -> Change:
    return lambda state: state.update({name: state[name][:-1].contiguous()})


def far_group(state: State) -> None:
    state["model.layers.0.mlp.up_proj.g_idx"] += 100


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        ("gptq", short("model.layers.1.mlp.up_proj.scales"), "don't fit each other"),
        ("gptq", short("model.layers.1.mlp.up_proj.qzeros"), "don't fit each other"),
        ("gptq", short("model.layers.1.mlp.up_proj.g_idx"), "don't fit each other"),
        (
            "gptq",
            lambda s: s.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)}),
            "is there twice",
        ),
        ("gptq", lambda s: s.update({"model.layers.1.mlp.up_proj.bias": torch.ones(256)}), "no place"),
        ("awq", short("model.layers.1.mlp.up_proj.scales"), "don't fit each other"),
        (
            "compressed-tensors w4a16",
            short("model.layers.1.mlp.up_proj.weight_scale"),
            "don't fit each other",
        ),
        ("fp8, tensors", lambda s: s.pop("model.layers.1.mlp.up_proj.weight_scale"), "don't fit each other"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(
    checkpoint: Callable[..., tuple[Path, torch.nn.Module]], scheme: str, change: Change, message: str
) -> None:
    path, _ = checkpoint(scheme)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj") as error:
        loader.load(path)
    assert message in str(error.value)


def test_groups_that_do_not_exist_are_named(checkpoint: Callable[..., tuple[Path, torch.nn.Module]]) -> None:
    path, _ = checkpoint("gptq, by activation")
    state = load_file(path / "model.safetensors")
    far_group(state)
    save_file(state, path / "model.safetensors")
    with pytest.raises((CheckpointError, ValueError), match="g_idx names groups"):
        loader.load(path).weights.read("layers.0.mlp.up.weight")


def test_one_matrix_without_a_form_makes_all_dense(
    checkpoint: Callable[..., tuple[Path, torch.nn.Module]],
) -> None:
    """Or that one would be fitted anew, at a loss that nobody asked for."""
    path, _ = checkpoint("gptq")
    assert loader.load(path).kinds == {"int4 (gptq, 4 bits)": 21}
    state = load_file(path / "model.safetensors")
    order = state["model.layers.2.mlp.down_proj.g_idx"]
    state["model.layers.2.mlp.down_proj.g_idx"] = order.flip(0).contiguous()
    save_file(state, path / "model.safetensors")
    loaded = loader.load(path)
    assert (loaded.quantize, loaded.kinds) == ("dense", {"gptq, 4 bits": 21})


def test_what_writers_add_and_nobody_needs_is_left_alone(
    checkpoint: Callable[..., tuple[Path, torch.nn.Module]],
) -> None:
    """AutoGPTQ gives every layer a bias; FP8 checkpoints suggest scales of an 8-bit cache, and call theirs two ways."""
    path, _ = checkpoint("gptq")
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.bias"] = torch.zeros(256)
    save_file(state, path / "model.safetensors")
    assert loader.load(path).quantize == "int4"


@pytest.mark.parametrize("name", ["fp8, tensors"])
def test_scales_of_fp8_have_two_names(
    checkpoint: Callable[..., tuple[Path, torch.nn.Module]], name: str
) -> None:
    path, model = checkpoint(name)
    state = load_file(path / "model.safetensors")
    renamed = {key.replace("weight_scale", "weight_scale_inv"): value for key, value in state.items()}
    renamed["model.layers.0.self_attn.k_scale"] = torch.tensor(1.0)
    save_file(renamed, path / "model.safetensors")
    truth = model.get_submodule("model.layers.0.mlp.up_proj").weight.detach().numpy()
    np.testing.assert_allclose(loader.load(path).weights.read("layers.0.mlp.up.weight"), truth, rtol=1e-6)


def test_a_missing_part_is_named(checkpoint: Callable[..., tuple[Path, torch.nn.Module]]) -> None:
    path, _ = checkpoint("gptq")
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.scales"]
    save_file(state, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.scales"):
        loader.load(path)


def test_mxfp4_is_what_its_standard_says() -> None:
    """Against the formula, value by value: sign, exponent and mantissa of e2m1, times 2^(scale - 127)."""
    from splitfuse.formats import mxfp4
    from splitfuse.models.parts import as_float32

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 10, 2, 16), dtype=np.uint8)
    scales = rng.integers(110, 140, (3, 10, 2), dtype=np.uint8)
    scheme = mxfp4.scheme(None)  # type: ignore[arg-type]
    got = as_float32(np.ascontiguousarray(scheme.floats({"_blocks": blocks, "_scales": scales})))
    assert scheme.shape({"_blocks": blocks.shape, "_scales": scales.shape}) == got.shape == (3, 64, 10)
    for expert, row, column in rng.integers(0, (3, 10, 64), (500, 3)):
        code = int(blocks[expert, row, column // 32, column % 32 // 2] >> 4 * (column % 2) & 15)
        exponent, mantissa = code >> 1 & 3, code & 1
        value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        value *= 2.0 ** (int(scales[expert, row, column // 32]) - 127) * (-1 if code & 8 else 1)
        assert got[expert, column, row] == value
