"""FP8 checkpoints: e4m3 with a scale per tensor, per row, or per block of rows and columns (DeepSeek-V3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..models.family import Fields
from ..models.parts import as_float32
from .scheme import Floats, Parts, Scheme


def _table() -> Floats:
    """What each byte stands for: sign, 4 bits of exponent, 3 of mantissa, no infinity (arXiv:2209.05433)."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -value, value).astype(np.float32)


E4M3 = _table()


def shape(stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    n, k = stored[".weight"]
    return n, k


def scaled(codes: Floats, scale: Floats, block: tuple[int, int] | None) -> Floats:
    """codes [n, k] times one scale, one a row, or one a block."""
    n, k = codes.shape
    if block is not None and scale.ndim == 2:
        rows, columns = block
        scale = np.repeat(np.repeat(scale, rows, axis=0)[:n], columns, axis=1)[:, :k]
    elif scale.size == n:
        scale = scale.reshape(n, 1)
    elif scale.size != 1:
        raise ValueError(f"scales {scale.shape} of a matrix {codes.shape}")
    codes *= scale.astype(np.float32)
    return codes


def scheme(fields: Fields) -> Scheme:
    fields.expect("fmt", "e4m3")
    fields.expect("activation_scheme", "dynamic", "static")
    block = fields.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and min(block) > 0):
        raise fields.error(f"weight_block_size is {block!r}; expected two numbers")
    size = None if block is None else (int(block[0]), int(block[1]))
    scale = ".weight_scale_inv" if block is not None else ".weight_scale"
    return _fp8(scale, size)


def fbgemm(fields: Fields) -> Scheme:
    return _fp8(".weight_scale", None)


def _fp8(scale: str, block: tuple[int, int] | None) -> Scheme:
    def floats(parts: Parts) -> Floats:
        return scaled(E4M3[parts[".weight"]], as_float32(parts[scale]), block)

    return Scheme(
        "fp8",
        ".weight",
        (scale, ".input_scale", ".activation_scale"),
        shape,
        floats,
        optional=(".input_scale", ".activation_scale"),
        dtype="F8_E4M3",
    )
