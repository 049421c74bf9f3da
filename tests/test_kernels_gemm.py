"""The linear layers of the CPU backend on every rung of the ISA ladder, held to float64 and to scalar code.

`Ops` poisons every output with NaN and fails if anything beyond the last column was written.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from splitfuse import _core

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

ISAS = _core.cpu_isas()
DTYPES = ["float32", "bfloat16"]
ULP = 2.0**-24  # half a unit in the last place of a float32, relative
HALF_BF16 = 2.0**-8
EVERY_KERNEL = [pytest.param(dtype, isa, id=f"{isa}-{dtype}") for isa in ISAS for dtype in DTYPES]
every_kernel = pytest.mark.parametrize(("dtype", "isa"), EVERY_KERNEL)


def ops(dtype: str, isa: str, threads: int = 2) -> _core.testing.Ops:
    return _core.testing.Ops(dtype=dtype, isa=isa, threads=threads)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """What is left of float32 values in the format, as float32."""
    if dtype == "float32":
        return values.astype(np.float32)
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    return rounded(rng.standard_normal(shape), dtype)


def whole(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Small whole numbers: their sums are exact in float32, so every right kernel gives the same bits."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


def bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """How far a float32 sum over k may be from the truth: errors that walk at random, four sigmas."""
    k = w.shape[1]
    return 4 * np.sqrt(k + 2) * ULP * (np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T) + 1e-30


# ---- Activations in float64


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * np.vectorize(math.erfc, otypes=[float])(-x / np.sqrt(2))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": lambda x: x * sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),
    "relu": lambda x: np.maximum(x, 0),
}
GATED = [*ACTIVATIONS, "swiglu_clamped"]


def halves(activation: str, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a gated linear multiplies."""
    if activation != "swiglu_clamped":
        return ACTIVATIONS[activation](gate), up
    gate = np.minimum(gate, 7)
    return gate * sigmoid(1.702 * gate), np.clip(up, -7, 7) + 1


def act_error(dtype: str, activation: str, truth: np.ndarray) -> np.ndarray:
    return np.abs(truth) * (40 * ULP + (HALF_BF16 if dtype == "bfloat16" else 0)) + 1e-30


# Rows, n, k: around the tile of every kernel, odd everywhere, several blocks of rows, of k, of both.
SHAPES = [
    (1, 1, 1),
    (1, 48, 2),
    (2, 7, 3),
    (6, 16, 32),
    (7, 17, 33),
    (8, 47, 257),
    (9, 49, 64),
    (13, 96, 1),
    (31, 257, 31),
    (64, 1, 65),
    (257, 31, 5),
    (5, 100, 1537),
    (3, 19, 5001),
    (530, 20, 17),
    (395, 50, 1601),
]


def random_shapes(count: int) -> list[tuple[int, int, int]]:
    rng = np.random.default_rng(2026)
    return [tuple(int(v) for v in rng.integers(1, 258, 3)) for _ in range(count)]


every_shape = pytest.mark.parametrize("shape", SHAPES + random_shapes(8), ids=lambda s: "x".join(map(str, s)))


@every_kernel
@every_shape
def test_whole_numbers_are_exact(dtype, isa, shape):
    m, n, k = shape
    rng = np.random.default_rng(m * 7919 + n * 104729 + k)
    x, w, b, acc = whole(rng, m, k), whole(rng, n, k), whole(rng, n), whole(rng, m, n)
    run = ops(dtype, isa)
    truth = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.array_equal(run.linear(w, None, x), truth)
    assert np.array_equal(run.linear(w, b, x), truth + b)
    assert np.array_equal(run.linear_add(w, None, x, acc), acc + truth)
    assert np.array_equal(run.linear_add(w, b, x, acc), acc + truth + b)


@every_kernel
@every_shape
def test_random_numbers_are_close_to_the_truth_and_to_the_scalar_kernel(dtype, isa, shape):
    m, n, k = shape
    rng = np.random.default_rng(m + n * 31 + k * 977)
    x, w, b = normal(rng, dtype, m, k), normal(rng, dtype, n, k), normal(rng, "float32", n)
    truth = x.astype(np.float64) @ w.astype(np.float64).T + b
    error = bound(x, w) + 2 * ULP * np.abs(truth)
    out = ops(dtype, isa).linear(w, b, x)
    assert (np.abs(out - truth) <= error).all()
    assert (np.abs(out - ops(dtype, "ref").linear(w, b, x)) <= 2 * error).all()


@every_kernel
@every_shape
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_activated_and_gated(dtype, isa, shape, biased):
    m, n, k = shape
    rng = np.random.default_rng(m + n * 61 + k * 13)
    x = normal(rng, dtype, m, k)
    g, u = (rounded(rng.standard_normal((n, k)) / np.sqrt(k), dtype) for _ in range(2))
    gb, ub = (normal(rng, "float32", n) for _ in range(2)) if biased else (None, None)
    gate = x.astype(np.float64) @ g.astype(np.float64).T + (0 if gb is None else gb)
    up = x.astype(np.float64) @ u.astype(np.float64).T + (0 if ub is None else ub)
    gate_error = bound(x, g) + 2 * ULP * np.abs(gate)
    up_error = bound(x, u) + 2 * ULP * np.abs(up)
    run = ops(dtype, isa)
    for name in ["silu", str(rng.choice(GATED))]:
        left, right = halves(name, gate, up)
        error = 1.15 * gate_error * np.abs(right) + up_error * np.abs(left) + 1.15 * gate_error * up_error
        error += act_error(dtype, name, left * right)
        out = run.linear_gated(g, u, gb, ub, x, name)
        assert (np.abs(out - left * right) <= error * 1.01).all(), name
    name = str(rng.choice(list(ACTIVATIONS)))
    truth = ACTIVATIONS[name](gate)
    error = 1.15 * gate_error + act_error(dtype, name, truth)
    assert (np.abs(run.linear_act(g, gb, x, name) - truth) <= error * 1.01).all(), name


@every_kernel
@pytest.mark.parametrize("activation", GATED)
def test_activations_over_all_of_their_range(dtype, isa, activation):
    values = np.concatenate(
        [np.linspace(-110, 110, 4001), np.linspace(-16, 16, 8001), np.geomspace(1e-30, 1e30, 601)]
    )
    x = rounded(values, dtype)[:, None]
    one = np.ones((1, 1), np.float32)
    run = ops(dtype, isa)
    outs = [run.linear_gated(one, one, None, None, x, activation)[:, 0]]
    wide = x[:, 0].astype(np.float64)
    with np.errstate(over="ignore"):
        left, right = halves(activation, wide, wide)
        truths = [left * right]
        if activation in ACTIVATIONS:
            outs.append(run.linear_act(one, None, x, activation)[:, 0])
            truths.append(left)
    # An exponent that is rounded before e is raised to it loses what it is large.
    rounding = {
        "gelu_tanh": 6 * np.abs(wide + 0.044715 * wide**3),
        "swiglu_clamped": 4 * np.abs(np.minimum(wide, 7)),
    }
    tolerance = (12 + rounding.get(activation, 0 * wide)) * ULP + (0 if dtype == "float32" else HALF_BF16)
    for out, truth in zip(outs, truths, strict=True):
        finite = np.abs(truth) < 3e38
        # Where e^-x is beyond float32 the result is a zero; the truth there is below the smallest normal number.
        assert (np.abs(out - truth)[finite] <= (np.abs(truth) * tolerance)[finite] + 1e-34).all()
        assert np.isposinf(out[~finite]).all()


@every_kernel
def test_not_a_number_and_infinity_stay_in_their_row_and_column(dtype, isa):
    rng = np.random.default_rng(5)
    m, n, k = 11, 53, 35
    x, w, u = whole(rng, m, k), whole(rng, n, k), whole(rng, n, k)
    run = ops(dtype, isa)
    clean = run.linear(w, None, x)
    gated = {name: run.linear_gated(w / 64, u, None, None, x, name) for name in GATED}
    plain = {name: run.linear_act(w / 64, None, x, name) for name in ACTIVATIONS}

    bad = x.copy()
    bad[4, k - 1] = np.nan
    for out, before in [
        (run.linear(w, None, bad), clean),
        *((run.linear_gated(w / 64, u, None, None, bad, name), gated[name]) for name in gated),
        *((run.linear_act(w / 64, None, bad, name), plain[name]) for name in plain),
        (run.linear_add(w, None, bad, np.zeros((m, n), np.float32)), clean),
    ]:
        assert np.isnan(out[4]).all()
        others = np.arange(m) != 4
        assert same_bits(out[others], before[others])

    bad = w.copy()
    bad[n - 1, k - 1] = np.inf
    out = run.linear(bad, None, x)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(out[:, n - 1], x @ bad[n - 1], equal_nan=True)
    assert same_bits(out[:, : n - 1].copy(), clean[:, : n - 1].copy())
    assert np.isinf(out[:, n - 1]).any()


@every_kernel
@pytest.mark.parametrize("size", [(70, 129, 67), (23, 40, 3203)], ids=["small", "deep"])
def test_a_row_has_the_same_bits_in_any_company(dtype, isa, size):
    m, n, k = size
    rng = np.random.default_rng(9)
    x, w, u = normal(rng, dtype, m, k), normal(rng, dtype, n, k), normal(rng, dtype, n, k)
    b, acc = normal(rng, "float32", n), normal(rng, "float32", m, n)

    def results(threads, rows):
        run = ops(dtype, isa, threads)
        return (
            run.linear(w, b, x[rows]),
            run.linear_add(w, None, x[rows], acc[rows]),
            *(run.linear_gated(w / 16, u, b, b, x[rows], name) for name in GATED),
            *(run.linear_act(w / 16, b, x[rows], name) for name in ACTIVATIONS),
        )

    everything = np.arange(m)
    expected = results(1, everything)
    for threads in (1, 2, 3):
        companies = [everything, rng.permutation(m)]
        companies += [rng.choice(m, count, replace=False) for count in (1, 2, 3, 5, 6, 7, 8, 9, 15, 16, 17)]
        for rows in companies:
            for out, alone in zip(results(threads, rows), expected, strict=True):
                assert same_bits(out, alone[rows])


@every_kernel
def test_many_rows_have_the_bits_of_few(dtype, isa):
    # More rows than one task takes, so that they are cut into blocks.
    rng = np.random.default_rng(10)
    x, w = normal(rng, dtype, 1100, 300), normal(rng, dtype, 200, 300)
    run = ops(dtype, isa, 3)
    out = run.linear(w, None, x)
    for begin, end in [(0, 1), (500, 515), (511, 513), (1099, 1100)]:
        assert same_bits(out[begin:end], run.linear(w, None, x[begin:end]))


@every_kernel
def test_packing_in_runs_of_rows_changes_nothing(dtype, isa):
    rng = np.random.default_rng(11)
    w, b, x = normal(rng, dtype, 101, 37), normal(rng, "float32", 101), normal(rng, dtype, 5, 37)
    run = ops(dtype, isa)
    for parts in (2, 3, 7, 101):
        assert same_bits(run.linear(w, b, x, parts), run.linear(w, b, x))


@every_kernel
def test_weights_of_every_format(dtype, isa):
    rng = np.random.default_rng(12)
    half = rng.standard_normal((50, 33)).astype(np.float16)
    brain = torch.from_numpy(rng.standard_normal((50, 33))).bfloat16()
    x = normal(rng, dtype, 4, 33)
    run = ops(dtype, isa)
    assert same_bits(run.linear(half, None, x), run.linear(half.astype(np.float32), None, x))
    bits = brain.view(torch.uint16).numpy()
    assert same_bits(run.linear(bits, None, x), run.linear(brain.float().numpy(), None, x))
    bias = half[:, 0].copy()
    assert same_bits(run.linear(bits, bias, x), run.linear(bits, bias.astype(np.float32), x))


@every_kernel
@pytest.mark.parametrize("k", [1, 2, 31, 64, 577])
def test_embed_gives_the_rounded_rows(dtype, isa, k):
    rng = np.random.default_rng(13)
    table = rng.standard_normal((101, k)).astype(np.float32)
    table[3, 0], table[4, k - 1] = np.inf, np.nan
    ids = [100, 0, 3, 4, 47, 48, 49, 15, 16, 3]
    out = ops(dtype, isa).embed(table, ids)
    assert np.array_equal(out, rounded(table[ids], dtype), equal_nan=True)
    scaled = ops(dtype, isa).embed(table, ids, 11.3)
    assert np.array_equal(scaled, out * np.float32(11.3), equal_nan=True)
    x = rng.standard_normal((10, k)).astype(np.float32)
    positions = [98, 0, 1, 2, 45, 46, 47, 13, 14, 1]
    added = ops(dtype, isa).embed_positions(table, positions, 2, x)
    assert np.array_equal(added, x + rounded(table[np.array(positions) + 2], dtype), equal_nan=True)


@every_kernel
def test_a_tied_head_reads_the_embedding_table(dtype, isa):
    # Row i of the identity, embedded and multiplied with the same table, meets itself alone.
    table = np.eye(60, 60, dtype=np.float32) * 3
    run = ops(dtype, isa)
    hidden = run.embed(table, list(range(60)))
    assert np.array_equal(run.linear(table, None, hidden), table * 3)


def test_tensors_that_do_not_fit_are_refused():
    run = ops("float32", "ref")
    w = np.zeros((4, 3), np.float32)
    with pytest.raises(_core.InvalidArgument, match=r"tensor \[5\] does not fit at row 0 of a linear \[4, 3"):
        run.linear(w, np.zeros(5, np.float32), np.zeros((1, 3), np.float32))
    with pytest.raises(_core.CheckpointError, match="float32, float16, or uint16"):
        run.linear(w.astype(np.float64), None, np.zeros((1, 3), np.float32))


def test_isa_names():
    for isa in ISAS:
        assert isa in ops("float32", isa).describe()
    with pytest.raises(_core.ConfigError, match=r"no instruction set 'sse9'; choose one of: auto, ref"):
        ops("float32", "sse9")
    with pytest.raises(_core.ConfigError, match="float32 or bfloat16, not float16"):
        ops("float16", "ref")
    with pytest.raises(_core.ConfigError, match="threads: -1"):
        ops("float32", "ref", -1)


def test_environment_chooses_for_auto(monkeypatch):
    monkeypatch.delenv("SPLITFUSE_CPU_ISA", raising=False)
    assert ISAS[-1] in ops("float32", "auto").describe()
    monkeypatch.setenv("SPLITFUSE_CPU_ISA", "ref")
    assert "ref" in ops("float32", "auto").describe()
    assert ISAS[-1] in ops("float32", ISAS[-1]).describe()
    monkeypatch.setenv("SPLITFUSE_CPU_ISA", "sse9")
    with pytest.raises(_core.ConfigError, match="SPLITFUSE_CPU_ISA: no instruction set 'sse9'"):
        ops("float32", "auto")
