"""Codes of a few bits packed in 32-bit words, and groups of them in the engine's form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..gguf_blocks import Integers
from .scheme import Floats

Codes = npt.NDArray[np.uint8]
GROUP = 32  # of the engine's integers


def unpack(words: npt.NDArray[Any], bits: int, axis: int) -> Codes:
    """Each word becomes 32 / bits codes along `axis`, lowest bits first."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts & np.uint32(2**bits - 1)).astype(np.uint8)
    return np.moveaxis(codes.reshape(*words.shape[:-1], -1), -1, axis)


def in_groups(k: int, groups: int) -> bool:
    """Whether each group is made of whole ones of the engine's."""
    return k % (GROUP * groups) == 0


def int4(codes: Codes, scales: Floats, zeros: Floats) -> Integers:
    """The engine's form of scale * (code - zero): codes [n, k] of 4 bits, scales and zeros [n, groups]."""
    n, k = codes.shape
    groups = scales.shape[1]
    pairs = codes.reshape(n, k // GROUP, 2, GROUP // 2)
    each = k // groups // GROUP
    scale = np.repeat(scales.astype(np.float32), each, axis=1)
    minimum = np.repeat(-scales.astype(np.float32) * zeros, each, axis=1)
    return pairs[:, :, 0] | pairs[:, :, 1] << 4, scale, minimum.astype(np.float32)


def dequantise(codes: Codes, scales: Floats, zeros: Floats) -> Floats:
    """scale * (code - zero), as int4()."""
    n, k = codes.shape
    grouped = codes.reshape(n, scales.shape[1], -1).astype(np.float32)
    return ((grouped - zeros[..., None]) * scales[..., None].astype(np.float32)).reshape(n, k)
