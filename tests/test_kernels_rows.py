"""RMSNorm of the CPU backend on every rung of the ISA ladder, held to float64."""

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
# Around the width of a register and of four; hidden sizes are multiples of 4 or more.
COLUMNS = [4, 8, 24, 60, 64, 72, 88, 136, 576, 1000, 4096]


def ops(dtype: str, isa: str, threads: int = 2) -> _core.testing.Ops:
    return _core.testing.Ops(dtype=dtype, isa=isa, threads=threads)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


@every_kernel
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e6])
def test_truth(dtype: str, isa: str, columns: int, size: float) -> None:
    rng = np.random.default_rng(columns)
    x = (rng.standard_normal((5, columns)) * size).astype(np.float32)
    weight = rng.standard_normal(columns).astype(np.float32)
    out = ops(dtype, isa).rms_norm(x, weight, 1e-5)
    wide = x.astype(np.float64)
    truth = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(1e-5)) * weight
    relative = 2.0**-20 if dtype == "float32" else 2.0**-8
    assert np.all(np.abs(out - truth) <= relative * np.abs(truth) + 1e-30)


@every_kernel
def test_rounds_once(dtype: str, isa: str) -> None:
    """The bfloat16 result is the float32 result rounded to nearest, ties to even."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((9, 576)).astype(np.float32), rng.standard_normal(576).astype(np.float32)
    wide = ops("float32", isa).rms_norm(x, weight, 1e-6)
    out = ops(dtype, isa).rms_norm(x, weight, 1e-6)
    assert out.tobytes() == (wide if dtype == "float32" else bfloat16(wide)).tobytes()


@every_kernel
def test_rows_do_not_matter_to_each_other(dtype: str, isa: str) -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((40, 88)).astype(np.float32), rng.standard_normal(88).astype(np.float32)
    whole = ops(dtype, isa, 1).rms_norm(x, weight, 1e-5)
    for threads in (1, 2, 5):
        backend = ops(dtype, isa, threads)
        for row in (0, 7, 39):
            assert backend.rms_norm(x[row : row + 1], weight, 1e-5).tobytes() == whole[row].tobytes()
        chosen = [0, 3, 4, 17, 39]
        assert backend.rms_norm(x, weight, 1e-5, rows=chosen).tobytes() == whole[chosen].tobytes()


@every_kernel
def test_special_rows(dtype: str, isa: str) -> None:
    x = np.zeros((3, 24), np.float32)
    x[1, 5], x[2, 23] = np.nan, np.inf
    out = ops(dtype, isa).rms_norm(x, np.ones(24, np.float32), 1e-5)
    assert np.array_equal(out[0], np.zeros(24, np.float32))
    assert np.isnan(out[1]).all()
    assert np.isnan(out[2, 23])
