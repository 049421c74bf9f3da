"""FP8 checkpoints: e4m3 with a scale per tensor, per row, or per block of rows and columns (DeepSeek-V3)."""

from __future__ import annotations

import numpy as np

from ..models.family import Fields
from ..models.parts import as_float32
from .scheme import Floats, Parts, Scheme, Shapes


def _table() -> Floats:
    """What each byte stands for: sign, 4 bits of exponent, 3 of mantissa, no infinity (arXiv:2209.05433)."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -value, value).astype(np.float32)


E4M3 = _table()
_SCALES = (".weight_scale", ".weight_scale_inv")
_OF_INPUTS = (".input_scale", ".activation_scale")


def shape(stored: Shapes) -> tuple[int, int]:
    n, k = stored[".weight"]
    if not stored.keys() & set(_SCALES):
        raise ValueError(stored)
    return n, k


def block_size(fields: Fields, name: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None: the field is missing."""
    value = fields.get(name)
    if value is None:
        return None
    whole = (
        isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)
    )
    if not whole:
        raise fields.error(f"{name} is {value!r}; expected two integers above 0")
    return value[0], value[1]


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
    return of_blocks("fp8", block_size(fields, "weight_block_size"))


def fbgemm(fields: Fields) -> Scheme:
    return of_blocks("fbgemm fp8", None)


def of_blocks(kind: str, block: tuple[int, int] | None) -> Scheme:
    """e4m3 times the scale of a block, of a row or of all; writers disagree about the scale's name."""

    def floats(parts: Parts) -> Floats:
        scale = parts[".weight_scale_inv"] if ".weight_scale_inv" in parts else parts[".weight_scale"]
        return scaled(E4M3[parts[".weight"]], as_float32(scale), block)

    return Scheme(
        kind,
        ".weight",
        (*_SCALES, *_OF_INPUTS),
        shape,
        floats,
        optional=(*_SCALES, *_OF_INPUTS),
        dtype="F8_E4M3",
    )
