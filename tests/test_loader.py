"""Directories and files: which tensor goes where, and a clear refusal of everything that is no model."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import TINY, copy_of, edit_json, run_python
from splitfuse import CheckpointError, loader
from test_families import LLAMA2

# Hugging Face directories


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "sharded": {"shards": 3},
    "bin": {"fmt": "bin"},
    "bin sharded": {"fmt": "bin", "shards": 3, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_weight_is_the_one_that_transformers_loads(tiny_llama, variant):
    from transformers import AutoModelForCausalLM

    path = tiny_llama(**variant)
    if "shards" in variant:
        assert len([*path.glob("*.safetensors"), *path.glob("*.bin")]) > 1
    found = loader.load(path)
    state = AutoModelForCausalLM.from_pretrained(path, dtype="float32").state_dict()
    layers = TINY["num_hidden_layers"]
    expected = {"embed.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    if not variant.get("tie_word_embeddings"):
        expected["lm_head.weight"] = "lm_head.weight"
    parts = {
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(layers):
        for ours, theirs in parts.items():
            biased = variant.get("attention_bias") and "norm" not in ours
            for kind in ("weight", "bias") if biased else ("weight",):
                expected[f"layers.{layer}.{ours}.{kind}"] = f"model.layers.{layer}.{theirs}.{kind}"
    assert sorted(found.weights.names()) == sorted(expected)
    for ours, theirs in expected.items():
        np.testing.assert_array_equal(found.weights.read(ours), state[theirs].numpy(), ours)


def test_eos_is_what_config_and_generation_config_say(tiny_llama, tmp_path):
    path = copy_of(tiny_llama(), tmp_path)
    edit_json(path / "config.json", eos_token_id=257)
    edit_json(path / "generation_config.json", eos_token_id=[7, 257, 9], temperature=0.6)
    model = loader.load(path)
    assert model.config.eos_token_ids == [7, 257, 9]
    assert model.generation_config["temperature"] == 0.6
    edit_json(path / "generation_config.json", eos_token_id=...)
    assert loader.load(path).config.eos_token_ids == [257]
    (path / "generation_config.json").unlink()
    assert loader.load(path).config.eos_token_ids == [257]
    edit_json(path / "config.json", eos_token_id=None)
    assert loader.load(path).config.eos_token_ids == []


def test_tensors_that_are_no_weights_are_left_alone(tiny_llama, tmp_path):
    path = copy_of(tiny_llama(tie_word_embeddings=True), tmp_path)
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(12, dtype=np.float32)
    save_file(state, path / "model.safetensors")
    assert "lm_head.weight" not in loader.load(path).weights.names()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
            r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing",
        ),
        (lambda state: state.pop("lm_head.weight"), r"'lm_head\.weight' is missing"),
        (lambda state: [state.pop(name) for name in list(state) if ".0." in name], "and 4 more are missing"),
        (
            lambda state: state.update({"model.extra.weight": np.ones(3, np.float32)}),
            r"'model\.extra\.weight' has no place",
        ),
        (
            lambda state: state.update({"model.norm.weight": np.ones(87, np.float32)}),
            r"'model\.norm\.weight' has shape \[87\].*\[88\]",
        ),
        (
            lambda state: state.update({"model.norm.weight": np.ones(88, np.float64)}),
            r"'model\.norm\.weight' is F64; supported: F32, F16, BF16",
        ),
    ],
)
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_wrong_tensors_are_named(tiny_llama, tmp_path, change, named, fmt):
    path = copy_of(tiny_llama(), tmp_path)
    state = load_file(path / "model.safetensors")
    change(state)
    if fmt == "bin":
        import torch

        (path / "model.safetensors").unlink()
        torch.save(
            {name: torch.from_numpy(values) for name, values in state.items()}, path / "pytorch_model.bin"
        )
        named = named.replace("F64", "float64")
    else:
        save_file(state, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        loader.load(path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "..\\x.safetensors", ""]
)
def test_an_index_leads_nowhere_else(tiny_llama, tmp_path, shard):
    path = copy_of(tiny_llama(shards=3), tmp_path / "inside")
    shutil.copy(tiny_llama() / "model.safetensors", tmp_path)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.norm.weight": shard})
    with pytest.raises(CheckpointError, match="a shard lies in the same directory"):
        loader.load(path)


def test_missing_shards_are_named(tiny_llama, tmp_path):
    path = copy_of(tiny_llama(shards=3), tmp_path)
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d shards are missing: {gone.name}"):
        loader.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"text"', "[" * 100000, "\ud800".encode("utf-8", "surrogatepass")]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_corrupt_json_file_is_named(tiny_llama, tmp_path, name, text):
    path = copy_of(tiny_llama(shards=3), tmp_path)
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        loader.load(path)


def test_a_corrupt_safetensors_file_is_named(tiny_llama, tmp_path):
    path = copy_of(tiny_llama(), tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        (path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            loader.load(path)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        loader.load(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="holds no model"):
        loader.load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes\.txt: expected a \.gguf file"):
        loader.load(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2))
    with pytest.raises(CheckpointError, match="holds no weights"):
        loader.load(tmp_path)


class Planted:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_bin_file_is_not_run(tiny_llama, tmp_path):
    import torch

    path = copy_of(tiny_llama(), tmp_path)
    (path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Planted(tmp_path / "planted")}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a checkpoint of plain tensors"):
        loader.load(path)
    assert not (tmp_path / "planted").exists()
    (path / "pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        loader.load(path)


def test_torch_is_needed_for_bin_files_alone(tiny_llama):
    """Neither torch nor transformers is imported, and where torch is absent a .bin says so."""
    code = """
import sys
sys.modules["torch"] = None  # importing it fails
from splitfuse import loader
print(loader.load(sys.argv[1]).tokenizer.encode("the"), "transformers" in sys.modules)
try:
    loader.load(sys.argv[2])
except Exception as error:
    print(type(error).__name__, error)
"""
    result = run_python(code, tiny_llama(), tiny_llama(fmt="bin"))
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.endswith("False")
    assert second.startswith("CheckpointError")
    assert "pip install torch" in second


# Canonical checkpoints


def test_a_saved_model_is_the_same_model(tiny_llama, tmp_path):
    source = loader.load(tiny_llama(attention_bias=True))
    seen = []
    source.save(tmp_path / "out", "float32", lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    for again in (loader.load(tmp_path / "out"), loader.load(tmp_path / "out" / "model.safetensors")):
        assert again.config.to_json() == source.config.to_json()
        for name in source.weights.names():
            np.testing.assert_array_equal(again.weights.read(name), source.weights.read(name))
        messages = [{"role": "user", "content": "the 🙂"}]
        assert again.tokenizer.encode_chat(messages) == source.tokenizer.encode_chat(messages)
        assert again.tokenizer.special_tokens == source.tokenizer.special_tokens
        assert again.generation_config == source.generation_config


def test_a_model_is_not_saved_over_another(tiny_llama, tmp_path):
    path = copy_of(tiny_llama(), tmp_path)
    with pytest.raises(CheckpointError, match="choose a new directory"):
        loader.load(path).save(path)


def test_a_head_of_its_own_is_used_though_the_configuration_ties_it(tiny_llama, tmp_path):
    """As transformers does: a model that was tied in training may have been taught another head since."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llama(tie_word_embeddings=True), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    table = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": table.clone()}, file)
    assert loader.load(tmp_path / "model").config.tie_embeddings
    head = torch.randn_like(table)
    save_file({**state, "lm_head.weight": head}, file)
    loaded = loader.load(tmp_path / "model")
    assert not loaded.config.tie_embeddings
    np.testing.assert_array_equal(loaded.weights.read("lm_head.weight"), head.float().numpy())
