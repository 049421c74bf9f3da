"""The native reader and writer of safetensors, held against the safetensors package and torch."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from conftest import run_python
from splitfuse import _core

pytestmark = pytest.mark.machine_independent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORDS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def small_config(**fields):
    values = {
        "vocab_size": 75,
        "hidden_size": 40,
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 16,
        "intermediate_size": 50,
        "max_position": 128,
        "eos_token_ids": [2, 74],
    }
    return _core.ModelConfig(**{**values, **fields})


def random_weights(config, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in _core.canonical_names(config)
    }


def source_of(file, tensors):
    save_file(tensors, file)
    return _core.open_safetensors([str(file)], [(name, name) for name in tensors])


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("seed", range(20))
def test_reads_what_the_package_wrote(tmp_path, seed):
    rng = random.Random(seed)
    tensors = {}
    for index in range(rng.randrange(1, 12)):
        shape = [rng.randrange(0 if rng.random() < 0.1 else 1, 40) for _ in range(rng.randrange(4))]
        dtype = rng.choice(list(WORDS))
        tensors[f"layer.{index}.été\n"] = (torch.randn(shape) * 100).to(dtype)
    metadata = {"format": "pt", 'quote"': "line\nbreak \U0001f600"} if seed % 2 else None
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata)

    listed, found_metadata = _core.read_safetensors_header(str(file))
    assert {name: (dtype, shape) for name, dtype, shape, _ in listed} == {
        name: (WORDS[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()
    }
    assert found_metadata == (metadata or {})
    weights = {name: tensor for name, tensor in tensors.items() if tensor.dtype in DTYPES.values()}
    source = _core.open_safetensors([str(file)], [("as " + name, name) for name in weights])
    assert source.names() == ["as " + name for name in weights]
    for name, tensor in weights.items():
        np.testing.assert_array_equal(source.read("as " + name), tensor.float().numpy())


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_the_package_reads_what_is_written(tmp_path, source, to):
    config = small_config(qkv_bias=True, o_bias=True, mlp_bias=True)
    tensors = random_weights(config, DTYPES[source])
    file = tmp_path / "out.safetensors"
    seen = []
    _core.write_checkpoint(
        config,
        source_of(tmp_path / "in.safetensors", tensors),
        to,
        str(file),
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (file.stat().st_size,) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor.to(DTYPES[to])), name
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "splitfuse"
    assert metadata["splitfuse.version"] == _core.__version__
    assert json.loads(metadata["splitfuse.config"])["num_heads"] == 3

    reread, weights = _core.open_checkpoint(str(file))
    assert reread.to_json() == config.to_json()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(weights.read(name), tensor.to(DTYPES[to]).float().numpy())


@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_rounding_is_torchs_for_every_kind_of_float(tmp_path, to):
    config = small_config()
    tensors = random_weights(config)
    bits = np.random.default_rng(5).integers(0, 2**32, (75, 40), dtype=np.uint32)
    # Half of them near the format's ties and limits: the last bits of a float all zero but one, or all one.
    bits[::2] &= np.uint32(0xFFFFF000 if to == "float16" else 0xFFFF8000)
    values = torch.from_numpy(bits.view(np.float32).copy())
    overflows = ~torch.isfinite(values.to(DTYPES[to])) & torch.isfinite(values)
    values[overflows | values.isnan()] = 0.5
    tensors["embed.weight"] = values
    file = tmp_path / "out.safetensors"
    _core.write_checkpoint(config, source_of(tmp_path / "in.safetensors", tensors), to, str(file))
    assert same_bits(load_file(file)["embed.weight"], values.to(DTYPES[to]))


def test_tied_models_and_directories(tmp_path):
    config = small_config(tie_embeddings=True)
    tensors = random_weights(small_config())
    _core.write_checkpoint(
        config,
        source_of(tmp_path / "in.safetensors", tensors),
        "float32",
        str(tmp_path / "model.safetensors"),
    )
    reread, weights = _core.open_checkpoint(str(tmp_path))
    assert reread.tie_embeddings
    assert "lm_head.weight" not in weights.names()
    with pytest.raises(_core.CheckpointError, match=r"in\.safetensors.*splitfuse convert"):
        _core.open_checkpoint(str(tmp_path / "in.safetensors"))


def test_an_interrupted_write_leaves_nothing(tmp_path):
    config = small_config()
    source = source_of(tmp_path / "in.safetensors", random_weights(config))

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _core.write_checkpoint(config, source, "float32", str(tmp_path / "out.safetensors"), stop)
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def damaged(rng, data):
    """One or two small changes of a file's header, or of its length."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = bytearray(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(header))
        kind = rng.randrange(5)
        if kind == 0:
            header[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del header[at : at + rng.randrange(1, 4)]
        elif kind == 2:
            header[at:at] = rng.choice([b" ", b"0", b"-", b",", b'"', b"[", b"}", b"1e1", b"\xff"])
        elif kind == 3:
            digits = [i for i, byte in enumerate(header) if chr(byte).isdigit()]
            header[rng.choice(digits)] = ord(rng.choice("0123456789"))
        else:
            rest = rest[:-1] if rng.random() < 0.5 else rest + b"\0"
    return struct.pack("<Q", len(header)) + bytes(header) + rest


def test_accepts_no_file_that_the_package_refuses(tmp_path):
    rng = random.Random(1)
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(0, 4)}
    good = tmp_path / "good.safetensors"
    save_file(tensors, good, {"format": "pt"})
    data = good.read_bytes()
    file = tmp_path / "bad.safetensors"
    accepted = refused = 0
    for _ in range(3000):
        changed = damaged(rng, data)
        if b"-0" in changed:
            continue  # the integer 0 here, a float there
        file.write_bytes(changed)
        try:
            listed, _ = _core.read_safetensors_header(str(file))
        except _core.CheckpointError:
            refused += 1
            continue
        accepted += 1
        if not {word for _, word, _, _ in listed} <= {"F32", "BF16"}:
            continue  # a word that the format may have tomorrow is no fault where the tensor isn't wanted
        with safe_open(file, "pt") as opened:
            assert sorted(opened.keys()) == sorted(name for name, *_ in listed)
    assert accepted > 50
    assert refused > 1000


def test_accepts_every_header_that_the_package_accepts(tmp_path):
    file = tmp_path / "x.safetensors"
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    for header in (
        "{" + entry + "}",
        "{" + entry + "}   \n\t",
        '{"__metadata__": {}, ' + entry + "}",
        '{"empty": {"shape": [0], "data_offsets": [4, 4], "dtype": "I8"}, ' + entry + "}",
        '{"\\u0061\\ud83d\\ude00": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        '{"f4": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}',
    ):
        raw = header.encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0\0\0\0")
        with safe_open(file, "np") as opened:
            names = sorted(opened.keys())
        assert sorted(name for name, *_ in _core.read_safetensors_header(str(file))[0]) == names


ENTRY = '"{}": {{"dtype": "U8", "shape": [{}], "data_offsets": [{}, {}]}}'
OVERLAP = "{" + ENTRY.format("a", 3, 0, 3) + ", " + ENTRY.format("b", 2, 2, 4) + "}"


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}}',
        '{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}',
        '{"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}',
        OVERLAP,
        '{"a": {"dtype": "U8", "shape": [4611686018427387904, 8], "data_offsets": [0, 4]}}',
        '{"a": {"shape": [4], "data_offsets": [0, 4]}}',
        '{"__metadata__": {"a": 1}, "b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        "[]",
        "{",
    ],
)
def test_both_refuse(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0\0\0\0")
    with pytest.raises(_core.CheckpointError, match=r"x\.safetensors: "):
        _core.read_safetensors_header(str(file))
    with pytest.raises(SafetensorError):
        safe_open(file, "np").__enter__()


def test_a_configuration_says_the_same_in_json():
    rng = np.random.default_rng(3)
    for _ in range(500):
        eps, low, magnitude = np.exp(rng.uniform(-40, 40, 3)).astype(np.float32).tolist()
        rope = _core.RopeConfig(inv_freq=[1.0, low], magnitude=magnitude)
        config = small_config(norm_eps=eps, ropes=[rope])
        values = json.loads(config.to_json())
        assert (values["norm_eps"], values["ropes"][0]["inv_freq"]) == (eps, [1.0, low])
        assert values["ropes"][0]["magnitude"] == magnitude
        assert _core.ModelConfig.from_json(config.to_json()).to_json() == config.to_json()
    with pytest.raises(_core.ConfigError, match=r"unknown field \"ropes\[0\]\.beta\""):
        _core.ModelConfig.from_json(json.dumps({**values, "ropes": [{**values["ropes"][0], "beta": 1}]}))
    moe = {key: value for key, value in values["moe"].items() if key != "top_k"}
    with pytest.raises(_core.ConfigError, match=r"field moe\.top_k is missing"):
        _core.ModelConfig.from_json(json.dumps({**values, "moe": moe}))
    del values["head_dim"]
    with pytest.raises(_core.ConfigError, match="field head_dim is missing"):
        _core.ModelConfig.from_json(json.dumps(values))


def test_a_word_that_is_unknown_is_refused_with_its_field():
    with pytest.raises(
        _core.ConfigError, match='norm_place: "after" is unknown here; expected "pre", "post"'
    ):
        small_config(norm_place="after")
    with pytest.raises(_core.ConfigError, match="scoring: "):
        _core.MoeConfig(scoring="argmax")


LOAD = """
import sys
from splitfuse import _core
model, weights = _core.open_checkpoint(sys.argv[1])
config = _core.EngineConfig(dtype="bfloat16", threads=1, token_budget=16, max_sequences=2, kv_bytes=1 << 20)
plan = _core.plan_memory(model, config)
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
before = peak()
engine = _core.Engine(model, weights, config)
print(peak() - before, plan.total, plan.weights)
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_takes_little_more_than_the_packed_weights(tmp_path, dtype):
    # Nearly all of it is one tensor: mapped as a whole while it is packed, it would be in memory twice.
    config = small_config(vocab_size=120_000, hidden_size=512, tie_embeddings=True)
    names = [name for name, _ in _core.canonical_names(config)]
    shapes = dict(_core.canonical_names(config))
    zeros = _core.callback_source(names, lambda name: np.zeros(shapes[name], np.float32))
    file = tmp_path / "model.safetensors"
    _core.write_checkpoint(config, zeros, dtype, str(file))
    done = run_python(LOAD, file)
    assert done.returncode == 0, done.stderr
    taken, planned, packed = map(int, done.stdout.split())
    assert packed > 100e6
    assert taken <= planned + 0.15 * packed
    assert taken >= packed  # or nothing was measured
