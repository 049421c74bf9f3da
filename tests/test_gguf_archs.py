"""Every architecture of GGUF files against the Hugging Face checkpoint that the file was converted from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engines import ISAS, Run, random_tokens
from gguf_convert import convert
from splitfuse import CheckpointError, ConfigError, loader
from splitfuse.gguf_archs import ARCHS
from splitfuse.gguf_file import GgufFile
from tiny_models import Tiny, save
from tiny_models_layer_norm import LAYER_NORM
from tiny_models_rms import MOE, RMS

pytestmark = pytest.mark.machine_independent  # each test names its instruction set


def with_fields(tiny: Tiny, **fields: Any) -> Tiny:
    return replace(tiny, fields={**tiny.fields, **fields})


def without_window(state: Any, config: Any) -> Any:
    return state, {**config, "sliding_window": None}


# What no key of a file says is as the published models have it.
FILES: dict[str, tuple[str, Tiny]] = {
    "llama": ("llama", RMS["llama"]),
    "llama, biases, yarn": ("llama", RMS["llama, biases, yarn"]),
    "mistral": ("llama", Tiny("mistral", {"head_dim": 40}, without_window)),
    "mixtral": ("llama", replace(RMS["mixtral"], rewrite=without_window)),
    "minicpm": ("minicpm", RMS["minicpm"]),
    "granite": ("granite", RMS["granite"]),
    "smollm3": ("smollm3", RMS["smollm3"]),
    "qwen": ("qwen", RMS["qwen"]),
    "qwen2": ("qwen2", RMS["qwen2"]),
    "qwen2moe": ("qwen2moe", RMS["qwen2_moe"]),
    "qwen3": ("qwen3", RMS["qwen3"]),
    "qwen3moe": ("qwen3moe", Tiny("qwen3_moe", {**MOE, "head_dim": 32, "norm_topk_prob": True})),
    "phi2": ("phi2", with_fields(LAYER_NORM["phi"], num_key_value_heads=None)),
    "phi3": ("phi3", RMS["phi3"]),
    "phi3, longrope, short": ("phi3", RMS["phi3, longrope, short"]),
    "phi3, longrope, long": ("phi3", RMS["phi3, longrope, long"]),
    "phi3, partial": ("phi3", RMS["phi3, partial"]),
    "gemma": ("gemma", RMS["gemma"]),
    "gemma2": ("gemma2", with_fields(RMS["gemma2"], query_pre_attn_scalar=32)),
    "gemma2, 27b": (
        "gemma2",
        with_fields(RMS["gemma2"], query_pre_attn_scalar=24, num_hidden_layers=46, intermediate_size=32),
    ),
    "gemma3": ("gemma3", with_fields(RMS["gemma3"], query_pre_attn_scalar=24)),
    "gpt2": ("gpt2", LAYER_NORM["gpt2"]),
    "starcoder": ("starcoder", LAYER_NORM["gpt_bigcode"]),
    "gptneox": ("gptneox", LAYER_NORM["gpt_neox"]),
    "gptneox, one after the other": (
        "gptneox",
        with_fields(LAYER_NORM["gpt_neox, one after the other"], hidden_act="gelu"),
    ),
    "gptj": ("gptj", LAYER_NORM["gptj"]),
    "bloom": ("bloom", LAYER_NORM["bloom"]),
    "falcon, 7b": ("falcon", LAYER_NORM["falcon, 7b"]),
    "falcon, 40b": ("falcon", LAYER_NORM["falcon, 40b"]),
    "falcon, 11b": ("falcon", with_fields(LAYER_NORM["falcon, 11b"], activation="gelu")),
    "stablelm": ("stablelm", LAYER_NORM["stablelm"]),
    "stablelm, parallel": ("stablelm", LAYER_NORM["stablelm, parallel"]),
    "stablelm, norms of heads": ("stablelm", LAYER_NORM["stablelm, norms of heads"]),
    "starcoder2": ("starcoder2", LAYER_NORM["starcoder2"]),
    "command-r": ("command-r", LAYER_NORM["cohere"]),
    "command-r, norms of heads": ("command-r", LAYER_NORM["cohere, norms of heads"]),
    "cohere2": ("cohere2", LAYER_NORM["cohere2, window 40"]),
    "olmo2": ("olmo2", RMS["olmo2"]),
    "exaone4": ("exaone4", RMS["exaone4"]),
    "exaone4, no windows": ("exaone4", RMS["exaone4, no windows"]),
    "chatglm": ("chatglm", RMS["glm"]),
    "glm4": ("glm4", RMS["glm4"]),
    "internlm2": ("internlm2", RMS["internlm2"]),
    "gpt-oss": ("gpt-oss", RMS["gpt_oss"]),
}
Source = Callable[[str], Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The Hugging Face checkpoint of one of FILES."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            save(FILES[name][1], made[name])
        return made[name]

    return make


def near(value: Any) -> Any:
    """Numbers are float32 in a file, and some are its inverse or its root."""
    if isinstance(value, dict):
        return {key: near(item) for key, item in value.items()}
    if isinstance(value, list):
        return [near(item) for item in value]
    return pytest.approx(value, rel=3e-7) if isinstance(value, float) else value


def test_every_architecture_is_tried() -> None:
    assert {arch for arch, _ in FILES.values()} == set(ARCHS)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_the_checkpoint_it_was_made_from(source: Source, tmp_path: Path, name: str) -> None:
    expected = loader.load(source(name))
    found = loader.load(convert(source(name), tmp_path / "model.gguf", FILES[name][0]))
    says, meant = (json.loads(model.config.to_json()) for model in (found, expected))
    if FILES[name][0] == "llama":  # is Mistral too
        del says["family"], meant["family"]
    assert says == near(meant)
    assert sorted(found.weights.names()) == sorted(expected.weights.names())
    for weight in expected.weights.names():
        np.testing.assert_array_equal(found.weights.read(weight), expected.weights.read(weight), weight)


def all_logits(path: Path, tokens: list[int]) -> np.ndarray:
    run = Run(path, capture=True, isa=ISAS[-1], token_budget=512)
    run.put(0, tokens, max_tokens=1, prompt_logprobs=0)
    run.finish_all()
    return np.stack([run.logits[0][position] for position in range(1, len(tokens) + 1)])


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_checkpoint(source: Source, tmp_path: Path, name: str) -> None:
    tokens = random_tokens(3, 60)
    expected = all_logits(source(name), tokens)
    found = all_logits(convert(source(name), tmp_path / "model.gguf", FILES[name][0]), tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# Types


def random_rows(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """[rows, bytes of a row] of any codes, with scales that are sensible numbers."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = (rng.standard_normal((rows, columns // block)) / 500).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = rng.integers(118, 124, raw.shape[:2])  # a power of two
    return raw.reshape(rows, -1)


# Where the float16 scales of a block lie.
SCALES: dict[str, list[int]] = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose rows any type can hold."""
    path = tmp_path_factory.mktemp("wide")
    save(Tiny("mixtral", {**WIDE, **EXPERTS}, without_window), path)
    return path


def turned_back(rows: np.ndarray, heads: int) -> np.ndarray:
    """Even rows of each head, then odd ones."""
    return np.concatenate([part for head in np.split(rows, heads) for part in (head[0::2], head[1::2])])


@pytest.mark.parametrize("kind", SCALES)
def test_random_blocks_of_every_type_are_what_the_gguf_package_makes_of_them(
    wide: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them rows that change places, and experts, one slice of a tensor each."""
    written: dict[str, np.ndarray] = {}

    def add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, asked: str) -> None:
        if asked == "F32":
            writer.add_tensor(name, np.ascontiguousarray(tensor))
            return
        *outer, columns = tensor.shape
        raw = random_rows(kind, int(np.prod(outer)), columns, len(written))
        type_ = gguf.GGMLQuantizationType[kind]
        written[name] = gguf.quants.dequantize(raw, type_).reshape(tensor.shape)
        writer.add_tensor(name, raw.reshape(*outer, -1), raw_dtype=type_)

    monkeypatch.setattr("gguf_convert.add_tensor", add)
    model = loader.load(convert(wide, tmp_path / "model.gguf", "llama", "any"))
    expected = {
        "embed.weight": written["token_embd.weight"],
        "layers.1.attn.q.weight": turned_back(written["blk.1.attn_q.weight"], 6),
        "layers.1.attn.k.weight": turned_back(written["blk.1.attn_k.weight"], 2),
        "layers.1.attn.v.weight": written["blk.1.attn_v.weight"],
        **{f"layers.2.moe.{e}.up.weight": written["blk.2.ffn_up_exps.weight"][e] for e in range(3)},
        **{f"layers.2.moe.{e}.down.weight": written["blk.2.ffn_down_exps.weight"][e] for e in range(3)},
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(model.weights.read(name), values, name)
    assert model.kinds == {kind: 3 * (4 + 3 * 3)}


def test_one_expert_alone_is_decoded(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loader.load(convert(wide, tmp_path / "model.gguf", "llama", "Q5_1"))
    rows: list[int] = []
    decode = GgufFile.decode

    def counted(self: GgufFile, tensor: Any, raw: np.ndarray) -> np.ndarray:
        rows.append(len(raw))
        return decode(self, tensor, raw)

    monkeypatch.setattr(GgufFile, "decode", counted)
    model.weights.read("layers.0.moe.2.gate.weight")
    assert rows == [256]


# What is not supported


@pytest.mark.parametrize(
    ("name", "more", "named"),
    [
        (
            "mixtral",
            {"llama.expert_gating_func": 2},
            "llama.expert_gating_func is 2; only 0 or 1 is supported",
        ),
        ("mixtral", {"llama.expert_weights_norm": False}, "llama.expert_weights_norm is False"),
        ("mixtral", {"llama.expert_weights_scale": 2.5}, "llama.expert_weights_scale is 2.5"),
        (
            "mixtral",
            {"llama.expert_group_count": 2},
            "llama.expert_group_count is not supported; supported: ",
        ),
        ("mixtral", {"llama.expert_count": 4}, r"ffn_gate_inp.weight' has shape \[5, 144\]"),
        ("mixtral", {"llama.expert_count": 6}, r"ffn_gate_inp.weight' has shape \[5, 144\]"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True]}, "sliding_window_pattern is .True."),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("olmo2", {"olmo2.attention.sliding_window": 64}, "olmo2.attention.sliding_window is not supported"),
        (
            "qwen2",
            {"qwen2.rope.dimension_sections": [1, 2]},
            "qwen2.rope.dimension_sections is not supported",
        ),
        ("qwen2", {"qwen2.rope.dimension_count": 12}, "qwen2.rope.dimension_count is 12; a head has 24"),
        ("phi2", {"phi2.rope.dimension_count": 26}, "phi2.rope.dimension_count is 26; a head has 24"),
        ("bloom", {"bloom.attention.max_alibi_bias": 8.0}, "bloom.attention.max_alibi_bias is not supported"),
        ("granite", {"granite.logit_scale": 0.0}, "granite.logit_scale is 0.0; expected a number above 0"),
        ("gptj", {"gptj.rope.freq_base": 500.0}, "gptj.rope.freq_base is 500.0"),
        ("command-r", {"command-r.logit_scale": None}, "command-r.logit_scale is missing"),
        ("gpt2", {"gpt2.attention.layer_norm_epsilon": None}, "gpt2.attention.layer_norm_epsilon is missing"),
        ("phi3, longrope, long", {"phi3.rope.scaling.attn_factor": -1.0}, "attn_factor is -1.0"),
    ],
)
def test_what_alters_the_result_and_is_not_supported_is_named(
    source: Source, tmp_path: Path, name: str, more: dict[str, Any], named: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=named):
        loader.load(convert(source(name), tmp_path / "model.gguf", FILES[name][0], more=more))


def test_older_files_of_minicpm_leave_the_scales_out(source: Source, tmp_path: Path) -> None:
    without = {f"minicpm.{name}_scale": None for name in ("embedding", "residual", "logit")}
    config = loader.load(convert(source("minicpm"), tmp_path / "m.gguf", "minicpm", more=without)).config
    assert config.embed_scale == 12
    assert config.residual_scale == pytest.approx(1.4 / 3**0.5)
    assert config.logit_scale == pytest.approx(256 / 144)


def test_a_file_may_say_which_layers_have_the_window(source: Source, tmp_path: Path) -> None:
    for pattern, expected in (
        ([True, False] * 3 + [True], [41, 0, 41, 0, 41, 0, 41]),
        (3, [41, 41, 0] * 2 + [41]),
    ):
        more = {"gemma3.attention.sliding_window_pattern": pattern}
        config = loader.load(convert(source("gemma3"), tmp_path / "m.gguf", "gemma3", more=more)).config
        assert [layer.window for layer in config.layers] == expected
        assert [layer.rope for layer in config.layers] == [1 if window else 0 for window in expected]
