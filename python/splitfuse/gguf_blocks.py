"""GGUF's blocks of 32 in the form of the engine's integers: the codes of the file, none fitted anew. The layouts are
those of ggml-common.h and ggml-quants.c in ggml."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[np.uint8]
Integers = tuple[npt.NDArray[Any], ...]
"""What `callback_source` takes: int8 (codes [rows, k], scales [rows, groups]), or int4 (codes [rows, groups, 16],
scales, minima)."""

_HALF = 2  # bytes of a float16


def _q4_0(raw: Raw) -> Integers:
    """w = d (q - 8). The product with 8 is exact."""
    blocks = _blocks(raw, 18)
    scale = _halves(blocks, 0)
    with np.errstate(over="ignore"):  # the engine says what it does of infinities
        return np.ascontiguousarray(blocks[..., 2:]), scale, scale * np.float16(-8)


def _q4_1(raw: Raw) -> Integers:
    """w = d q + m."""
    blocks = _blocks(raw, 20)
    return np.ascontiguousarray(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(raw: Raw) -> Integers:
    """w = d (q - 16); the fifth bits of the 32 codes are a word of their own."""
    blocks = _blocks(raw, 22)
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little") << 4
    four = np.concatenate([blocks[..., 6:] & 15, blocks[..., 6:] >> 4], axis=-1)
    return ((four | fifth).view(np.int8) - np.int8(16)).reshape(raw.shape[0], -1), _halves(blocks, 0)


def _q8_0(raw: Raw) -> Integers:
    """w = d q."""
    blocks = _blocks(raw, 34)
    return np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(raw.shape[0], -1), _halves(blocks, 0)


def _q4_k(raw: Raw) -> Integers:
    """256 weights in 8 groups, w = (d sc) q - dmin m; sc and m have 6 bits and are packed in 12 bytes.

    The products are exact in float32. Each 32 bytes of codes hold one group in their low halves and the next in
    their high ones.
    """
    blocks = _blocks(raw, 144)
    rows, count = blocks.shape[:2]
    low, high, both = (blocks[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = np.concatenate([low & 63, (both & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([high & 63, (both >> 4) | (high >> 6 << 4)], axis=-1)
    scale = _halves(blocks, 0).astype(np.float32)[..., None] * scales
    minimum = -_halves(blocks, _HALF).astype(np.float32)[..., None] * minima
    pairs = blocks[..., 16:].reshape(rows, count, 4, 2, 16)  # 4 times two groups: first and last 16 codes
    codes = np.empty((rows, count, 4, 2, 16), dtype=np.uint8)
    codes[..., 0, :] = pairs[..., 0, :] & 15 | pairs[..., 1, :] << 4
    codes[..., 1, :] = pairs[..., 0, :] >> 4 | pairs[..., 1, :] & 0xF0
    return (
        codes.reshape(rows, 8 * count, 16),
        scale.reshape(rows, 8 * count),
        minimum.reshape(rows, 8 * count),
    )


INT8: dict[str, Callable[[Raw], Integers]] = {"Q5_0": _q5_0, "Q8_0": _q8_0}
INT4: dict[str, Callable[[Raw], Integers]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}
"""By ggml's name of the type: its rows [rows, bytes of a row] as integers."""


def _blocks(raw: Raw, size: int) -> Raw:
    return raw.reshape(raw.shape[0], -1, size)


def _halves(blocks: Raw, at: int) -> npt.NDArray[np.float16]:
    """The float16 at byte `at` of each block."""
    return np.ascontiguousarray(blocks[..., at : at + _HALF]).view(np.float16)[..., 0]
