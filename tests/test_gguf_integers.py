"""Quantised GGUF files run as integers: what the file holds in 4 bits is computed in the same 4 bits, and a converted
checkpoint gives the same bits as quantising at load.
"""

import gguf
import numpy as np
import pytest

from engines import Run, random_tokens, same_bits
from splitfuse import LLM, CheckpointError, _core, loader
from splitfuse.gguf_blocks import INT4, INT8
from test_gguf import write_gguf

pytestmark = pytest.mark.machine_independent  # of packing, which no instruction set changes
KINDS = gguf.GGMLQuantizationType
PROMPT = random_tokens(7, 40)
# Bytes of a block, and where its float16 scales lie.
LAYOUT = {
    "Q4_0": (18, [0]),
    "Q5_0": (22, [0]),
    "Q8_0": (34, [0]),
    "Q4_1": (20, [0, 2]),
    "Q4_K": (144, [0, 2]),
    "Q6_K": (210, [208]),
}


def random_blocks(kind, rows, k, seed=0):
    """Valid rows of any codes: most groups leave some of the 16 levels out."""
    rng = np.random.default_rng(seed)
    size, scales = LAYOUT[kind]
    block, _ = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    raw = rng.integers(0, 256, (rows, k // block, size), dtype=np.uint8)
    raw[:, ::3, 16:] &= 0x77  # the lower half of the levels alone
    for at in scales:
        value = rng.standard_normal((rows, k // block)) / (1000 if kind.endswith("K") else 50)
        raw[..., at : at + 2] = value.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def dequantized(raw, kind):
    return gguf.quants.dequantize(raw, KINDS[kind])


def held(weight, format, dtype="float32"):
    """What panels of this format hold of a matrix, in float32."""
    run = _core.testing.Ops(dtype=dtype, isa="ref", threads=2, format=format)
    rows = len(weight[0] if isinstance(weight, tuple) else weight)
    return run.embed(weight, list(range(rows)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_blocks_of_one_scale_are_held_exactly(kind):
    raw = random_blocks(kind, 70, 320)
    format, as_integers = ("int4", INT4[kind]) if kind in INT4 else ("int8", INT8[kind])
    np.testing.assert_array_equal(held(as_integers(raw), format), dequantized(raw, kind))


def test_products_of_two_scales_are_rounded_to_half_precision():
    raw = random_blocks("Q4_K", 70, 768)
    codes, scales, minima = INT4["Q4_K"](raw)
    halves = codes, scales.astype(np.float16), minima.astype(np.float16)
    np.testing.assert_array_equal(held((codes, scales, minima), "int4"), held(halves, "int4"))
    truth = dequantized(raw, "Q4_K")
    size = np.repeat(15 * np.abs(scales) + np.abs(minima), 32, axis=1)
    assert (np.abs(held(halves, "int4") - truth) <= size * 2.0**-11 + 2.0**-21).all()


@pytest.mark.parametrize("kind", [*INT4, *INT8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_of_another_format_take_the_same_blocks_without_loss(kind, dtype):
    raw = random_blocks(kind, 70, 768)
    for format in ("dense", "int8" if kind in INT4 else "int4"):
        blocks = {**INT4, **INT8}[kind](raw)
        np.testing.assert_array_equal(
            held(blocks, format, dtype), held(dequantized(raw, kind), format, dtype)
        )


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((np.zeros((2, 1, 16), np.uint8),), "expected"),
        ((np.zeros((2, 33), np.int8), np.zeros((2, 1), np.float16)), "scales"),
        ((np.zeros((2, 1, 15), np.uint8), *[np.zeros((2, 1), np.float16)] * 2), "codes"),
        ((np.zeros((2, 32), np.uint8), *[np.zeros((2, 1), np.float16)] * 2), "codes"),
        ((np.zeros((2, 1, 16), np.uint8), np.zeros((2, 1), np.float16), np.zeros(2, np.float16)), "scales"),
        ((np.zeros((2, 1, 16), np.uint8), *[np.zeros((2, 1), np.int32)] * 2), "int32"),
        ((np.zeros((2, 1, 16), np.uint8), *[np.zeros((2, 1), np.uint16)] * 2), "scales"),
        (
            (np.zeros((2, 1, 16), np.uint8), np.zeros((2, 1), np.float16), np.zeros((2, 1), np.float32)),
            "scales",
        ),
    ],
)
def test_integers_of_another_shape_are_refused(parts, reason):
    source = _core.callback_source(["w"], lambda name: parts)
    with pytest.raises(CheckpointError, match=f"tensor w.*{reason}"):
        source.read("w")


@pytest.mark.parametrize(("format", "weight"), [("int8", 1e7), ("int4", -70000.0)])
def test_scales_beyond_half_precision_are_refused_at_load_too(format, weight):
    assert np.isfinite(held(np.full((3, 40), weight / 4, np.float32), format)).all()
    with pytest.raises(CheckpointError, match=f"beyond {format}"):
        held(np.full((3, 40), weight, np.float32), format)


# ---- Whole files


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(hidden_size=256, intermediate_size=256, head_dim=64)


def logits(path, quantize, dtype="bfloat16"):
    run = Run(path, capture=True, quantize=quantize, dtype=dtype)
    run.put(0, PROMPT, max_tokens=4)
    run.finish_all()
    return run.logits[0]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for position in a:
        assert same_bits(a[position], b[position])


@pytest.mark.parametrize("kind", ["F32", "Q6_K", "Q8_0", *INT4])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_converted_checkpoint_is_the_same_as_quantising_at_load(model, tmp_path, kind, quantize):
    file = write_gguf(tmp_path / "model.gguf", model, kind)
    loader.load(file).save(tmp_path / "out", quantize=quantize)
    converted = loader.load(tmp_path / "out")
    assert converted.quantize == converted.weights.format == quantize
    assert_same(logits(file, quantize), logits(tmp_path / "out", quantize))
    # Run as floats, it is the weights of the format that are run.
    weights = converted.weights.read("layers.1.mlp.up.weight").copy()
    again = loader.load(tmp_path / "out")
    again.save(tmp_path / "floats", "float32")
    np.testing.assert_array_equal(
        loader.load(tmp_path / "floats").weights.read("layers.1.mlp.up.weight"), weights
    )
    assert_same(logits(tmp_path / "floats", "dense"), logits(tmp_path / "out", "dense"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q6_K", "Q8_0"])
def test_auto_is_the_format_of_most_weights(model, tmp_path, kind, capfd):
    format = "int4" if kind.startswith("Q4") else "int8"
    file = write_gguf(tmp_path / "model.gguf", model, kind)
    loaded = loader.load(file)
    assert loaded.quantize_as("auto") == loaded.weights.format == format
    assert loaded.quantize_as(None) == loaded.quantize_as("none") == "dense"
    assert loaded.quantize_as("int8") == "int8"
    with LLM(file, quantize="auto", token_budget=64, verbose=True) as llm:
        assert f"{format} weights" in llm.engine.describe()
    how = "as stored" if kind in (*INT4, *INT8) else "fitted anew"
    assert f"matrices {format}: {7 * 3} {kind} {how}" in capfd.readouterr().err
    with LLM(file, token_budget=64, verbose=True) as llm:
        assert "weights" not in llm.engine.describe()
    assert f"matrices dense: {7 * 3} {kind} dequantised" in capfd.readouterr().err


def test_a_file_of_floats_stays_one(model, tmp_path, capfd):
    loaded = loader.load(write_gguf(tmp_path / "model.gguf", model, "F16"))
    assert loaded.quantize_as("auto") == "dense"
    assert not loaded.kinds


def test_a_converted_checkpoint_is_run_as_it_is_unless_told(model, tmp_path, capfd):
    loader.load(model).save(tmp_path / "out", quantize="int4")
    for asked, said in ((None, "int4 weights"), ("int8", "int8 weights"), ("none", "bfloat16")):
        with LLM(tmp_path / "out", quantize=asked, token_budget=64, verbose=True) as llm:
            assert said in llm.engine.describe()
            assert asked != "none" or "weights" not in llm.engine.describe()
    assert f"matrices int4: {7 * 3} int4 as stored" in capfd.readouterr().err
