"""Linear layers over int8 and int4 weights, on every rung of the ISA ladder, held to float64 on the integers that
weights and rows become.

`Ops` poisons every output with NaN and fails if anything beyond the last column was written. What weights became is
read back through `embed`.
"""

import numpy as np
import pytest
import torch

from splitfuse import _core

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

ISAS = _core.cpu_isas()
FORMATS = ["int8", "int4"]
DTYPES = ["float32", "bfloat16"]
GROUP = 32
HALF_BF16 = 2.0**-8
ULP = 2.0**-24

every_kernel = pytest.mark.parametrize(
    ("format", "dtype", "isa"),
    [
        pytest.param(format, dtype, isa, id=f"{isa}-{format}-{dtype}")
        for isa in ISAS
        for format in FORMATS
        for dtype in DTYPES
    ],
)
# Rows, n, k: around the tile of every kernel, odd everywhere, several blocks of rows, of k, of both.
SHAPES = [
    (1, 1, 1), (1, 48, 32), (2, 7, 31), (3, 16, 33), (4, 47, 64), (5, 49, 257), (7, 31, 96), (9, 100, 1537),
    (31, 257, 129), (64, 17, 65), (257, 33, 5), (3, 19, 5001), (530, 20, 17), (230, 50, 1601),
]  # fmt: skip
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def ops(format: str, dtype: str, isa: str, threads: int = 2) -> _core.testing.Ops:
    return _core.testing.Ops(dtype=dtype, isa=isa, threads=threads, format=format)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return values.astype(np.float32)
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    return rounded(rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-1], 1))), dtype)


def grouped(x: np.ndarray) -> np.ndarray:
    """[rows, groups, 32], padded with zeros."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // GROUP) * GROUP), x.dtype)
    padded[:, :k] = x
    return padded.reshape(rows, -1, GROUP)


def as_integers(x: np.ndarray) -> np.ndarray:
    """What rows of activations are once they are 8-bit integers with a scale for each 32, in float64."""
    groups = grouped(x.astype(np.float32))
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest >= 2.0**-100)
    whole = np.rint(groups * inverse)
    assert np.abs(whole).max(initial=0) <= 127
    values = whole.astype(np.float64) * (largest * np.float32(1 / 127)).astype(np.float64)
    return values.reshape(len(x), -1)[:, : x.shape[1]]


def weights_of(run: _core.testing.Ops, w: np.ndarray) -> np.ndarray:
    return run.embed(w, list(range(len(w)))).astype(np.float64)


def bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """How far the float32 sums over groups may be from the truth. int4 sums a scaled and a constant part that may
    cancel: each is at most 16 times the largest weight of the channel."""
    groups = -(-w.shape[1] // GROUP)
    size = np.abs(x) @ np.broadcast_to(np.abs(w).max(1, keepdims=True, initial=0), w.shape).T
    return 16 * 4 * np.sqrt(2 * groups + 2) * ULP * size + 1e-30


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_are_the_nearest_of_their_32(dtype, isa):
    rng = np.random.default_rng(1)
    w = normal(rng, "float32", 101, 77)
    w[5] = 0
    w[6, 3] = 1e-38
    run = ops("int8", dtype, isa)
    step = np.abs(grouped(w)).max(-1, keepdims=True) / 127
    got = weights_of(run, w)
    # The scale is a half, rounded up.
    limit = np.broadcast_to(step / 2 * (1 + 2.0**-10) + 2.0**-25, grouped(w).shape)
    assert (np.abs(grouped(got.astype(np.float32)) - grouped(w)) <= limit).all()
    assert (got[5] == 0).all()
    assert np.array_equal(got, weights_of(ops("int8", "float32", "ref"), w))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 31, 32, 33, 96, 100])
def test_int4_weights_are_as_near_as_their_32_allow(isa, k):
    rng = np.random.default_rng(k)
    w = normal(rng, "float32", 70, k)
    w[3] = 0
    w[4] = 2.5
    got = weights_of(ops("int4", "float32", isa), w)
    parts = grouped(w)
    real = grouped(np.ones_like(w)) > 0
    low = np.where(real, parts, np.inf).min(-1, keepdims=True)
    high = np.where(real, parts, -np.inf).max(-1, keepdims=True)
    step = (high - low) / 15
    halves = np.maximum(np.abs(low), np.abs(high)) * 2.0**-10 + step * 2.0**-6  # scale and minimum are halves
    error = np.where(real, grouped(got.astype(np.float32)) - parts, 0)
    # No worse, in squares, than rounding to 16 even steps over the range; that is what the fit begins with.
    assert ((error**2).sum(-1) <= (real * (step / 2 + halves) ** 2).sum(-1) + 1e-30).all()
    assert (got[3] == 0).all()
    assert np.array_equal(got[4], np.full(k, 2.5))
    assert np.array_equal(got, weights_of(ops("int4", "bfloat16", "ref"), w))


def test_int8_keeps_what_was_of_its_form():
    """What came from Q8_0, even where it is dequantised in between; and the lowest code, which only a file can have."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-127, 128, (40, 128)).astype(np.int8)
    codes[:, ::32] = 127
    scales = rng.integers(1, 2048, (40, 4)).astype(np.float16) * np.float16(2.0**-14)
    w = codes * np.repeat(scales, GROUP, axis=1).astype(np.float32)
    run = ops("int8", "bfloat16", ISAS[-1])
    assert np.array_equal(weights_of(run, w), w)
    codes[:, 1::32] = -128
    w = codes * np.repeat(scales, GROUP, axis=1).astype(np.float32)
    assert np.array_equal(run.embed((codes, scales), list(range(40))), w)
    x = np.eye(128, dtype=np.float32) * 127
    for isa in ISAS:
        got = ops("int8", "float32", isa).linear((codes, scales), None, x)
        assert np.allclose(got, 127 * w.T, rtol=1e-6, atol=0)


def test_int4_keeps_what_was_of_its_form():
    """Sixteen steps that halves hold exactly come back as they were."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (40, 4, GROUP))
    codes[:, :, 0], codes[:, :, 1] = 0, 15  # the whole range is used
    scale = rng.integers(1, 60, (40, 4, 1)) / 64
    minimum = -rng.integers(0, 200, (40, 4, 1)) / 16
    w = (codes * scale + minimum).reshape(40, -1).astype(np.float32)
    assert np.array_equal(weights_of(ops("int4", "bfloat16", ISAS[-1]), w), w)


@every_kernel
@every_shape
def test_sums_are_those_of_the_integers(format, dtype, isa, shape):
    m, n, k = shape
    rng = np.random.default_rng(m + n * 31 + k * 977)
    x, w = normal(rng, dtype, m, k), normal(rng, "float32", n, k)
    b, acc = normal(rng, "float32", 1, n)[0], normal(rng, "float32", m, n)
    run = ops(format, dtype, isa)
    rows, weights = as_integers(x), weights_of(run, w)
    truth = rows @ weights.T
    error = bound(rows, weights) + 4 * ULP * (np.abs(truth) + np.abs(b))
    assert (np.abs(run.linear(w, None, x) - truth) <= error).all()
    assert (np.abs(run.linear(w, b, x) - (truth + b)) <= error).all()
    assert (np.abs(run.linear_add(w, b, x, acc) - (acc + truth + b)) <= error + 4 * ULP * np.abs(acc)).all()


@every_kernel
@every_shape
def test_gated_and_activated(format, dtype, isa, shape):
    m, n, k = shape
    rng = np.random.default_rng(m + n * 61 + k * 13)
    x = normal(rng, dtype, m, k)
    g, u = (rng.standard_normal((n, k)).astype(np.float32) / np.float32(np.sqrt(k)) for _ in range(2))
    gb, ub = (normal(rng, "float32", 1, n)[0] for _ in range(2))
    run = ops(format, dtype, isa)
    rows, gate_weights, up_weights = as_integers(x), weights_of(run, g), weights_of(run, u)
    gate, up = rows @ gate_weights.T + gb, rows @ up_weights.T + ub
    gate_error = bound(rows, gate_weights) + 4 * ULP * np.abs(gate)
    up_error = bound(rows, up_weights) + 4 * ULP * np.abs(up)
    clipped = np.minimum(gate, 7)
    for name, left, right in [
        ("silu", silu(gate), up),
        ("relu", np.maximum(gate, 0), up),
        ("swiglu_clamped", silu(1.702 * clipped) / 1.702, np.clip(up, -7, 7) + 1),
    ]:
        error = 1.15 * gate_error * np.abs(right) + up_error * np.abs(left) + 1.15 * gate_error * up_error
        error += np.abs(left * right) * (40 * ULP + (HALF_BF16 if dtype == "bfloat16" else 0)) + 1e-30
        out = run.linear_gated(g, u, gb, ub, x, name)
        assert (np.abs(out - left * right) <= error * 1.01).all(), name
    for name, truth in [("none", gate), ("silu", silu(gate)), ("relu", np.maximum(gate, 0))]:
        error = (
            1.15 * gate_error + np.abs(truth) * (40 * ULP + (HALF_BF16 if dtype == "bfloat16" else 0)) + 1e-30
        )
        assert (np.abs(run.linear_act(g, gb, x, name) - truth) <= error).all(), name


@every_kernel
def test_rows_of_the_table_of_positions(format, dtype, isa):
    rng = np.random.default_rng(8)
    table, x = normal(rng, "float32", 50, 583), normal(rng, "float32", 3, 583)
    run = ops(format, dtype, isa)
    rows = run.embed(table, [2, 49, 17])
    assert np.array_equal(run.embed(table, [2, 49, 17], 3.7), rows * np.float32(3.7))
    assert np.array_equal(run.embed_positions(table, [0, 47, 15], 2, x), x + rows)


@every_kernel
@pytest.mark.parametrize("size", [(70, 129, 67), (23, 40, 3203)], ids=["small", "deep"])
def test_a_row_has_the_same_bits_in_any_company(format, dtype, isa, size):
    m, n, k = size
    rng = np.random.default_rng(9)
    x, w, u = normal(rng, dtype, m, k), normal(rng, "float32", n, k), normal(rng, "float32", n, k)
    whole = ops(format, dtype, isa, 1).linear(w, None, x)
    gated = ops(format, dtype, isa, 1).linear_gated(w / 64, u, None, None, x)
    act = ops(format, dtype, isa, 1).linear_act(w / 64, None, x, "gelu")
    for threads in (1, 2, 5):
        run = ops(format, dtype, isa, threads)
        for first, last in [(0, 1), (3, 5), (2, 9), (m - 1, m), (0, m)]:
            assert run.linear(w, None, x[first:last]).tobytes() == whole[first:last].tobytes()
            out = run.linear_gated(w / 64, u, None, None, x[first:last])
            assert out.tobytes() == gated[first:last].tobytes()
            out = run.linear_act(w / 64, None, x[first:last], "gelu")
            assert out.tobytes() == act[first:last].tobytes()


@every_kernel
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(format, dtype, isa, bad):
    rng = np.random.default_rng(5)
    m, n, k = 11, 53, 70
    x, w = normal(rng, dtype, m, k), normal(rng, "float32", n, k)
    run = ops(format, dtype, isa)
    clean = run.linear(w, None, x)
    x[4, k - 1] = bad
    out = run.linear(w, None, x)
    others = np.arange(m) != 4
    assert np.isnan(out[4]).all()
    assert out[others].tobytes() == clean[others].tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_that_is_not_finite_stays_in_its_channel(format, isa):
    rng = np.random.default_rng(6)
    x, w = normal(rng, "float32", 3, 64), normal(rng, "float32", 20, 64)
    run = ops(format, "float32", isa)
    clean = run.linear(w, None, x)
    w[7, 40] = np.inf
    out = run.linear(w, None, x)
    others = np.arange(20) != 7
    assert np.isnan(out[:, 7]).all()
    assert out[:, others].tobytes() == clean[:, others].tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_largest_integers_do_not_saturate(dtype, isa):
    """127 times 127 in every place: pairs of products come to 32258, and nothing may be cut off on the way."""
    signs = np.where(np.arange(64) % 3 == 0, -1.0, 1.0).astype(np.float32)
    x = np.stack([np.full(64, 127.0), signs * 127, np.full(64, -127.0)]).astype(np.float32)
    x = rounded(x, dtype)
    w = np.stack([np.full(64, 127.0), signs * 127, np.full(64, -127.0)]).astype(np.float32)
    out = ops("int8", dtype, isa).linear(w, None, x)
    assert np.abs(out - x.astype(np.float64) @ w.T).max() <= 64 * 127 * 127 * 1e-6
