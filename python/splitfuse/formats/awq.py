"""AWQ: codes [k, n / 8] of 4 bits packed along n in an order of their own, a scale and a zero for each group of k."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..gguf_blocks import Integers
from ..models.family import Fields
from ..models.parts import as_float32
from .packed import Codes, dequantise, in_groups, int4, unpack
from .scheme import Floats, Parts, Scheme, Shapes

_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of the outputs 0 .. 7


def _unpack(words: npt.NDArray[Any]) -> Codes:
    codes = unpack(words, 4, 1)
    rows = codes.shape[0]
    return codes.reshape(rows, -1, 8)[..., list(_PLACE)].reshape(rows, -1)


def scheme(fields: Fields) -> Scheme:
    bits = fields.integer("bits", fields.integer("w_bit", 4))
    if bits != 4:
        raise fields.error(f"bits is {bits}; only 4 is supported")
    fields.expect("version", "gemm", "GEMM")
    fields.expect("zero_point", True)

    def matrix(parts: Parts) -> tuple[Codes, Floats, Floats]:
        zeros = _unpack(parts[".qzeros"]).astype(np.float32)
        return _unpack(parts[".qweight"]).T, as_float32(parts[".scales"]).T, zeros.T

    def floats(parts: Parts) -> Floats:
        return dequantise(*matrix(parts))

    def integers(parts: Parts) -> Integers:
        return int4(*matrix(parts))

    def keeps(stored: Shapes, parts: Parts) -> bool:
        return in_groups(stored[".qweight"][0], stored[".scales"][0])

    def shape(stored: Shapes) -> tuple[int, int]:
        k, words = stored[".qweight"]
        groups, n = stored[".scales"]
        if n != words * 8 or stored[".qzeros"] != (groups, words) or k % groups:
            raise ValueError(stored)
        return n, k

    return Scheme(
        "awq, 4 bits",
        ".qweight",
        (".qzeros", ".scales"),
        shape,
        floats,
        format="int4",
        integers=integers,
        keeps=keeps,
    )
