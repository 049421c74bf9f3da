"""GPTQ: codes [k / (32 / bits), n] packed along k, with a scale and a zero for each group along k."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..gguf_blocks import Integers
from ..models.family import Fields
from ..models.parts import as_float32
from .packed import Codes, dequantise, int4, unpack
from .scheme import Floats, Parts, Scheme

_BITS = (2, 4, 8)


def scheme(fields: Fields) -> Scheme:
    bits = fields.integer("bits")
    if bits not in _BITS:
        raise fields.error(f"bits is {bits}; supported: {', '.join(map(str, _BITS))}")
    # The first version of the format stores zeros less one.
    more = 0 if fields.get("checkpoint_format", "gptq") == "gptq_v2" else 1
    fields.expect("checkpoint_format", "gptq", "gptq_v2")

    def matrix(parts: Parts) -> tuple[Codes, Floats, Floats]:
        codes = unpack(parts[".qweight"], bits, 0).T
        zeros = unpack(parts[".qzeros"], bits, 1).astype(np.float32).T + more
        return codes, as_float32(parts[".scales"]).T, zeros[: codes.shape[0]]

    def group_of(parts: Parts, k: int, groups: int) -> np.ndarray | None:
        """Of each input, where it isn't the next after as many inputs as the others have."""
        order = parts.get(".g_idx")
        if order is None or np.array_equal(order, np.arange(k) // -(-k // groups)):
            return None
        return order

    def floats(parts: Parts) -> Floats:
        codes, scales, zeros = matrix(parts)
        order = group_of(parts, codes.shape[1], scales.shape[1])
        if order is None:
            return dequantise(codes, scales, zeros)
        return (codes.astype(np.float32) - zeros[:, order]) * scales[:, order]

    def integers(parts: Parts) -> Integers | None:
        codes, scales, zeros = matrix(parts)
        if group_of(parts, codes.shape[1], scales.shape[1]) is not None:
            return None
        return int4(codes, scales, zeros)

    def shape(stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        words, n = stored[".qweight"]
        return n, words * (32 // bits)

    return Scheme(
        f"gptq, {bits} bits",
        ".qweight",
        (".qzeros", ".scales", ".g_idx"),
        shape,
        floats,
        optional=(".g_idx",),
        format="int4" if bits == 4 else "dense",
        integers=integers if bits == 4 else None,
    )
