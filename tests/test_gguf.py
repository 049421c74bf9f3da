"""GGUF files: written here as llama.cpp's converter writes them, read back exactly; bad ones are refused."""

import json
import random
import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from k_quants import K_QUANTS
from splitfuse import CheckpointError, ConfigError, loader
from splitfuse.gguf_file import GgufFile
from splitfuse.gguf_tokenizer import read_tokenizer
from splitfuse.tokenizer import Tokenizer
from test_text import sentencepiece_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(rows, heads):
    """Rows i and i + half of a head side by side, as llama.cpp's converter lays q and k."""
    half = rows.shape[0] // heads // 2
    order = [
        head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)
    ]
    return rows[order]


def write_gguf(path, source, kind="F32", arch="llama", tokenizer=True, metadata=None, tensors=None):
    """`source`: a tiny Llama in the Hugging Face layout; `metadata`: further keys, None removes one."""
    config = json.loads((source / "config.json").read_text())
    state = load_file(source / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    values = {
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.key_length": config["head_dim"],
        f"{arch}.attention.value_length": config["head_dim"],
        f"{arch}.rope.dimension_count": config["head_dim"],
        f"{arch}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.vocab_size": config["vocab_size"],
        "general.file_type": 0,
    }
    if tokenizer:
        values |= tokenizer_metadata(Tokenizer.from_directory(source), source)
    values |= metadata or {}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        add_value(writer, key, value)
    for name, tensor in state.items():
        if name in ("model.layers.0.self_attn.rotary_emb.inv_freq",):
            continue
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, heads if "q_proj" in name else kv_heads)
        add_tensor(writer, gguf_name(name), tensor, kind if tensor.ndim == 2 else "F32")
    for name, tensor in (tensors or {}).items():
        add_tensor(writer, name, tensor, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer, key, value):
    if value is None:
        return
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    adders.get(type(value), writer.add_array)(key, value)


def add_tensor(writer, name, tensor, kind):
    kind = gguf.GGMLQuantizationType[kind]
    if kind.name in K_QUANTS:  # the package can't make these
        raw = K_QUANTS[kind.name](np.asarray(tensor, dtype=np.float32))
        writer.add_tensor(name, raw, raw_dtype=kind)
        return
    writer.add_tensor(
        name, gguf.quants.quantize(np.ascontiguousarray(tensor, dtype=np.float32), kind), raw_dtype=kind
    )


def tokenizer_metadata(tokenizer, source):
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    count = json.loads((source / "config.json").read_text())["vocab_size"]
    tokens = [tokenizer.id_to_token(index) or f"[PAD{index}]" for index in range(count)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if tokenizer.is_special(index) else 1 for index in range(count)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def as_kind(values, kind):
    """What is left of float32 values in `kind`, by the gguf package."""
    if values.ndim < 2:
        return values
    kind = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).reshape(values.shape)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize(
    "shape", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}]
)
def test_weights_are_those_of_the_hugging_face_layout(tiny_llama, tmp_path, kind, shape):
    source = tiny_llama(hidden_size=96, intermediate_size=128, **shape)
    expected, found = loader.load(source), loader.load(write_gguf(tmp_path / "model.gguf", source, kind))
    assert found.config.to_json() == expected.config.to_json()
    assert sorted(found.weights.names()) == sorted(expected.weights.names())
    for name in expected.weights.names():
        np.testing.assert_array_equal(
            found.weights.read(name), as_kind(expected.weights.read(name), kind), name
        )


def test_floats_are_handed_on_as_they_are_stored(tiny_llama, tmp_path):
    for kind, dtype in (("F32", np.float32), ("F16", np.float16), ("BF16", np.uint16)):
        file = GgufFile(write_gguf(tmp_path / f"{kind}.gguf", tiny_llama(), kind))
        assert file.read(file.tensors["blk.1.ffn_up.weight"]).dtype == dtype


def test_a_directory_with_one_gguf_is_that_file(tiny_llama, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_llama())
    assert loader.load(tmp_path).path == tmp_path / "model.gguf"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        loader.load(tmp_path)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 64)])
def test_a_frequency_table_divides(tiny_llama, tmp_path, factor, original):
    """As llama.cpp's converter makes it of Llama 3.1's rule."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA3, "factor": factor, "original_max_position_embeddings": original}
    source = tiny_llama(head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(source), torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    table = {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}
    [found] = loader.load(write_gguf(tmp_path / "model.gguf", source, tensors=table)).config.ropes
    np.testing.assert_allclose(found.inv_freq, scaled, rtol=1e-6)


@pytest.mark.parametrize(
    "table", [np.ones(11), np.ones(24), np.full(12, -1.0), np.full(12, np.inf), np.full(12, np.nan)]
)
def test_a_frequency_table_that_cannot_divide_is_refused(tiny_llama, tmp_path, table):
    tensors = {"rope_freqs.weight": table.astype(np.float32)}
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight does not hold 12 numbers above 0"):
        loader.load(write_gguf(tmp_path / "model.gguf", tiny_llama(), tensors=tensors))


@pytest.mark.parametrize(
    ("scaling", "divisor"),
    [
        ({"scaling.type": "linear", "scaling.factor": 2.5}, 2.5),
        ({"scaling.factor": 2.5}, 2.5),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.type": "none", "scaling.factor": 2.5}, 1.0),
    ],
)
def test_linear_rope_scaling(tiny_llama, tmp_path, scaling, divisor):
    metadata = {f"llama.rope.{key}": value for key, value in scaling.items()}
    [rope] = loader.load(write_gguf(tmp_path / "model.gguf", tiny_llama(), metadata=metadata)).config.ropes
    np.testing.assert_allclose(rope.inv_freq, 10000.0 ** (-np.arange(0, 24, 2) / 24) / divisor, rtol=3e-7)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (
            {"llama.rope.scaling.type": "dynamic"},
            "'dynamic'; supported: 'none', 'linear', 'yarn', 'longrope'",
        ),
        ({"llama.rope.scaling.type": "longrope"}, "tensor 'rope_factors_short.weight' is missing"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1},
            "log_multiplier",
        ),
        ({"llama.rope.scaling.factor": 0.0}, r"llama\.rope\.scaling\.factor is 0"),
        ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base is 0"),
        ({"llama.expert_count": 8}, "llama.expert_used_count is missing"),
        ({"llama.expert_used_count": 8}, "llama.expert_used_count is 8"),
        ({"llama.rope.dimension_count": 12}, "llama.rope.dimension_count"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is not supported; supported: attention.causal, "),
        ({"llama.attention.head_count_kv": [2, 1, 2]}, "layer to layer"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.context_length": "many"}, "llama.context_length"),
        ({"llama.block_count": 4}, "blk.3"),
        ({"llama.block_count": 2}, "blk.2"),
        ({"llama.feed_forward_length": 117}, r"\[116, 88\].*\[117, 88\]"),
        ({"split.count": 2}, "split"),
    ],
)
def test_what_is_not_supported_is_named(tiny_llama, tmp_path, metadata, named):
    with pytest.raises((ConfigError, CheckpointError), match=named):
        loader.load(write_gguf(tmp_path / "model.gguf", tiny_llama(), metadata=metadata))


def test_another_architecture_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match=r"'mamba'.*supported: bloom, chatglm, .*, starcoder2"):
        loader.load(write_gguf(tmp_path / "model.gguf", tiny_llama(), arch="mamba"))


def test_an_unknown_tensor_is_refused(tiny_llama, tmp_path):
    extra = {"blk.0.attn_q_norm.weight": np.ones(24, dtype=np.float32)}
    with pytest.raises(CheckpointError, match="attn_q_norm"):
        loader.load(write_gguf(tmp_path / "model.gguf", tiny_llama(), tensors=extra))


# Damaged files


@pytest.fixture(scope="module")
def good(tiny_llama, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", tiny_llama(num_hidden_layers=1))


@settings(deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(good, share):
    file, whole = good.with_name("cut.gguf"), good.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"truncated|not a GGUF|can't be read"):
        loader.load(file)


@settings(deadline=None, max_examples=300)
@given(share=st.floats(0, 1), bits=st.binary(min_size=4, max_size=4))
def test_damage_in_the_header_is_an_error_or_harmless(good, share, bits):
    file, damaged = good.with_name("damaged.gguf"), bytearray(good.read_bytes())
    header = damaged.index(b"blk.0.ffn_up.weight") + 60  # past the metadata, into the list of tensors
    at = int(share * header)
    damaged[at : at + len(bits)] = bits
    file.write_bytes(damaged)
    with suppress(CheckpointError, ConfigError):  # anything else is a fault
        if (tokenizer := loader.load(file).tokenizer) is not None:
            tokenizer.encode("the theory")


@pytest.mark.parametrize(
    ("at", "data", "reason"),
    [
        (0, b"GGML", "not a GGUF"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "version"),
    ],
)
def test_another_format_or_version_is_refused(good, tmp_path, at, data, reason):
    damaged = bytearray(good.read_bytes())
    damaged[at : at + len(data)] = data
    (tmp_path / "model.gguf").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=reason):
        loader.load(tmp_path / "model.gguf")


# Tokenizers


def test_the_tokenizer_is_the_one_it_was_made_from(tiny_llama, tmp_path):
    source = tiny_llama()
    expected, found = (
        loader.load(source).tokenizer,
        loader.load(write_gguf(tmp_path / "m.gguf", source)).tokenizer,
    )
    assert found.special_tokens == expected.special_tokens
    messages = [{"role": "user", "content": "the theory 🙂"}]
    assert found.encode_chat(messages) == expected.encode_chat(messages)
    assert found.decode(expected.encode("Is it  the 🙂?")) == "Is it  the 🙂?"


# What each pattern does to the same text, as the models' own tokenizer.json files cut it.
CUTS = {
    "gpt-2": ["It", "'s", " 12345", " x", "'", "LL", "!!", "\n\n ", " a"],
    "llama-bpe": ["It", "'s", " ", "123", "45", " x", "'LL", "!!\n\n", " ", " a"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " x", "'LL", "!!\n\n", " ", " a"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", "5", " x", "'", "LL", "!!", "\n\n ", " a"],
    "default": ["It", "'", "s", " ", "123", "45", " x", "'", "LL", "!!", "\n\n ", " a"],
}


@pytest.mark.parametrize("name", CUTS)
def test_text_is_cut_as_the_file_says(tiny_llama, tmp_path, name):
    file = GgufFile(write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata={"tokenizer.ggml.pre": name}))
    backend = read_tokenizer(file)._backend
    text = "It's 12345 x'LL!!\n\n  a"
    assert [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)] == CUTS[name]


def test_llama3_adds_bos_unless_told(tiny_llama, tmp_path):
    for pre, flag, expected in (
        ("llama-bpe", None, 1),
        ("llama-bpe", False, 0),
        ("gpt-2", None, 0),
        ("gpt-2", True, 1),
    ):
        metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": flag}
        tokenizer = loader.load(write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata)).tokenizer
        assert tokenizer.encode("a").count(tokenizer.bos_token_id) == expected
        assert tokenizer.encode("<|bos|>a").count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "klingon"),
        ({"tokenizer.ggml.model": "t5"}, "t5"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "'a' twice"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type"),
        ({"tokenizer.ggml.merges": ["nogap"]}, "nogap"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "merges"),
        ({"tokenizer.ggml.bos_token_id": 100000}, "bos_token_id"),
        ({"tokenizer.ggml.tokens": None}, "tokens"),
    ],
)
def test_a_bad_tokenizer_is_refused(tiny_llama, tmp_path, metadata, named):
    model = loader.load(write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata))
    with pytest.raises((ConfigError, CheckpointError), match=named):
        _ = model.tokenizer


def test_a_file_without_a_tokenizer_is_a_model_without_one(tiny_llama, tmp_path):
    assert loader.load(write_gguf(tmp_path / "m.gguf", tiny_llama(), tokenizer=False)).tokenizer is None


def test_sentencepiece_merges_come_back_from_the_scores(tiny_llama, tmp_path):
    original = sentencepiece_tokenizer(metaspace=False)
    model = json.loads(original.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    rank = {left + right: index for index, (left, right) in enumerate(model["merges"])}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [
            float(-1 - rank.get(token, 1000 + index)) for index, token in enumerate(tokens)
        ],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    found = loader.load(write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata)).tokenizer
    expected = Tokenizer(original, {"bos_token": "<s>"})
    rng = random.Random(0)
    texts = ["", " ", "  hi", "hi hi.", "é🙂中", "<s>hi</s> hi", "a\n\thi"]
    texts += ["".join(rng.choices("hia. 🙂é\n", k=rng.randrange(30))) for _ in range(300)]
    for text in texts:
        ids = found.encode(text, add_special_tokens=False)
        assert ids == expected.encode(text, add_special_tokens=False), text
        assert found.decode(ids) == expected.decode(ids)
    assert found.encode("hi")[0] == found.bos_token_id == 1


# The real model


def test_smollm2_is_what_transformers_makes_of_it(smollm2, smollm2_gguf):
    expected, found = loader.load(smollm2), loader.load(smollm2_gguf)
    assert found.config.to_json() == expected.config.to_json()
    for name in [
        "embed.weight",
        "layers.0.attn.q.weight",
        "layers.29.attn.k.weight",
        "layers.7.mlp.down.weight",
    ]:
        exact, rounded = found.weights.read(name), expected.weights.read(name)
        assert np.all(np.abs(exact - rounded) <= np.abs(exact) * 2.0**-8), name  # bfloat16 keeps eight bits


def test_smollm2_tokens_agree_with_the_hugging_face_layout(smollm2, smollm2_gguf):
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    expected, found = AutoTokenizer.from_pretrained(smollm2), loader.load(smollm2_gguf).tokenizer
    rng = random.Random(1)
    alphabet = "abcXYZ 0123456789  \n\t\r.,'\"!?<|>_-éüß中文字かな한글🙂👩\u200d½²Ⅷ٣\u00a0\u3000\u0301"
    words = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "'ll", "   ", " 1234"]
    texts = [*list(topics.values())[:20], *words]
    for _ in range(500):
        texts.append(
            "".join(rng.choice(words) if rng.random() < 0.05 else rng.choice(alphabet) for _ in range(30))
        )
    for text in texts:
        ids = found.encode(text)
        assert ids == expected.encode(text)
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}]
    chat = expected.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert found.render_chat(messages) == chat
    assert found.encode_chat(messages) == expected.encode(chat, add_special_tokens=False)
