"""Norms, sums of rows and scaled logits of the CPU backend on every rung of the ISA ladder, held to float64.

`Ops` poisons every output with NaN and fails if anything beyond the last column was written.
"""

import itertools

import numpy as np
import pytest
import torch

from splitfuse import _core

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

EVERY_KERNEL = [
    pytest.param(dtype, isa, id=f"{isa}-{dtype}")
    for isa in _core.cpu_isas()
    for dtype in ("float32", "bfloat16")
]
every_kernel = pytest.mark.parametrize(("dtype", "isa"), EVERY_KERNEL)
every_isa = pytest.mark.parametrize("isa", _core.cpu_isas())
every_kind = pytest.mark.parametrize("kind", ["rms", "layer", "layer+bias", "none"])
# Around the width of a register and of four.
COLUMNS = [1, 3, 4, 8, 17, 24, 31, 60, 64, 72, 88, 136, 576, 1001, 4096]
EPS = np.float32(1e-5)


def ops(dtype: str, isa: str, threads: int = 2) -> _core.testing.Ops:
    return _core.testing.Ops(dtype=dtype, isa=isa, threads=threads)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


def draw(kind: str, columns: int, size: float = 1.0) -> tuple[np.ndarray, dict]:
    """Rows, those of layer norms with a mean, and what Ops wants to know of the norm."""
    rng = np.random.default_rng(columns)
    x = (rng.standard_normal((5, columns)) * size).astype(np.float32)
    weight, bias = (rng.standard_normal(columns).astype(np.float32) for _ in range(2))
    if kind == "none":
        return x, {}
    if kind == "rms":
        return x, {"weight": weight, "eps": EPS}
    x += np.float32(size)
    return x, {"weight": weight, "bias": bias if "bias" in kind else None, "eps": EPS, "kind": "layer"}


def normed(x: np.ndarray, how: dict) -> tuple[np.ndarray, np.ndarray]:
    """norm(x) in float64, and how far a float32 may be from it."""
    wide = x.astype(np.float64)
    if not how:
        return wide, 0 * wide
    centered = wide - wide.mean(-1, keepdims=True) if how.get("kind") == "layer" else wide
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + EPS)
    bias = 0.0 if how.get("bias") is None else how["bias"]
    truth = centered / deviation * how["weight"]
    lost = (
        np.abs(wide).max(-1, keepdims=True) / deviation * np.abs(how["weight"])
        if centered is not wide
        else 0.0
    )
    return truth + bias, 2.0**-20 * (np.abs(truth) + np.abs(bias)) + 2.0**-23 * lost + 1e-30


@every_kernel
@every_kind
def test_norm(dtype: str, isa: str, kind: str) -> None:
    run = ops(dtype, isa)
    for columns, size in itertools.product(COLUMNS, (1.0, 1e-4, 1e6)):
        x, how = draw(kind, columns, size)
        truth, error = normed(x, how)
        error += (0 if dtype == "float32" else 2.0**-8) * np.abs(truth)
        assert np.all(np.abs(run.norm(x, **how) - truth) <= error), (columns, size)


@every_isa
@every_kind
def test_norm_in_place_and_add(isa: str, kind: str) -> None:
    wide = ops("float32", isa)
    run = ops("bfloat16", isa)  # the stream is float32 whatever the activations are
    for columns, scale in itertools.product(COLUMNS, (1.0, 0.22)):
        y, how = draw(kind, columns)
        x = np.random.default_rng(7).standard_normal(y.shape).astype(np.float32)
        assert run.norm_in_place(y, **how).tobytes() == wide.norm(y, **how).tobytes()
        truth, error = normed(y, how)
        total = x + np.float64(np.float32(scale)) * truth
        limit = error + 2.0**-23 * (np.abs(x) + np.abs(truth))
        assert np.all(np.abs(run.add(x, y, scale, **how) - total) <= limit), (columns, scale)


@every_kernel
@every_kind
def test_rounds_once(dtype: str, isa: str, kind: str) -> None:
    """The bfloat16 result is the float32 result rounded to nearest, ties to even."""
    x, how = draw(kind, 577)
    wide = ops("float32", isa).norm(x, **how)
    out = ops(dtype, isa).norm(x, **how)
    assert out.tobytes() == (wide if dtype == "float32" else bfloat16(wide)).tobytes()


@every_kernel
@every_kind
def test_rows_do_not_matter_to_each_other(dtype: str, isa: str, kind: str) -> None:
    x, how = draw(kind, 87)
    x = np.concatenate([x * np.float32(i + 1) for i in range(8)])
    y = x[::-1].copy()
    whole, added = ops(dtype, isa, 1).norm(x, **how), ops(dtype, isa, 1).add(x, y, 0.3, **how)
    for threads in (1, 2, 5):
        run = ops(dtype, isa, threads)
        for row in (0, 7, 39):
            one = slice(row, row + 1)
            assert run.norm(x[one], **how).tobytes() == whole[one].tobytes()
            assert run.add(x[one], y[one], 0.3, **how).tobytes() == added[one].tobytes()
        chosen = [0, 3, 4, 17, 39]
        assert run.norm(x, rows=chosen, **how).tobytes() == whole[chosen].tobytes()


@every_kernel
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_special_rows(dtype: str, isa: str, kind: str) -> None:
    x = np.zeros((4, 24), np.float32)
    x[1, 5], x[2, 23], x[3] = np.nan, np.inf, 3.5
    out = ops(dtype, isa).norm(x, np.ones(24, np.float32), 1e-5, kind=kind)
    assert np.array_equal(out[0], np.zeros(24, np.float32))
    assert np.isnan(out[1]).all()
    assert np.isnan(out[2, 23])
    assert np.allclose(out[3], 0.0 if kind == "layer" else 1.0, rtol=1e-2, atol=1e-4)


@every_isa
def test_scaled_logits(isa: str) -> None:
    rng = np.random.default_rng(3)
    small = np.geomspace(1e-38, 1.0, 5000)
    x = np.concatenate([small, -small, rng.standard_normal(3001) * 60, np.linspace(-400, 400, 4001)])
    x = np.stack([x, x[::-1]]).astype(np.float32)
    x[0, -1], x[1, 0] = np.inf, -np.inf
    scale = np.float64(np.float32(0.3))
    run = ops("float32", isa)
    assert np.array_equal(run.scale_logits(x, 0.3, 0.0), x * np.float32(0.3))
    for cap in (30.0, 1.0):
        with np.errstate(invalid="ignore"):
            truth = cap * np.tanh(x * scale / cap)
        assert np.all(np.abs(run.scale_logits(x, 0.3, cap) - truth) <= 2.0**-24 * 10 * np.abs(truth) + 1e-42)
    whole = run.scale_logits(x, 0.3, 30.0)
    x[0, 77] = np.nan
    out = ops("float32", isa, 3).scale_logits(x, 0.3, 30.0)
    assert np.isnan(out[0, 77])
    out[0, 77] = whole[0, 77]
    assert out.tobytes() == whole.tobytes()
