"""GPTQ: codes [k / (32 / bits), n] packed along k, with a scale and a zero for each group along k."""

from __future__ import annotations

import numpy as np

from ..gguf_blocks import Integers
from ..models.family import Fields
from ..models.parts import as_float32
from .packed import Codes, dequantise, in_groups, int4, unpack
from .scheme import Floats, Parts, Scheme, Shapes

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
        if order.min() < 0 or order.max() >= groups:
            raise ValueError(f"g_idx names groups from {order.min()} to {order.max()} of {groups}")
        return order

    def floats(parts: Parts) -> Floats:
        codes, scales, zeros = matrix(parts)
        order = group_of(parts, codes.shape[1], scales.shape[1])
        if order is None:
            return dequantise(codes, scales, zeros)
        return (codes.astype(np.float32) - zeros[:, order]) * scales[:, order]

    def integers(parts: Parts) -> Integers:
        return int4(*matrix(parts))

    def keeps(stored: Shapes, parts: Parts) -> bool:
        _, k = shape(stored)
        groups = stored[".scales"][0]
        return in_groups(k, groups) and group_of(parts, k, groups) is None

    def shape(stored: Shapes) -> tuple[int, int]:
        words, n = stored[".qweight"]
        k, (groups, columns) = words * (32 // bits), stored[".scales"]
        fit = columns == n and stored[".qzeros"] == (groups, -(-n * bits // 32))
        if not fit or stored.get(".g_idx", (k,)) != (k,) or (".g_idx" not in stored and k % groups):
            raise ValueError(stored)
        return n, k

    return Scheme(
        f"gptq, {bits} bits",
        ".qweight",
        (".qzeros", ".scales", ".g_idx"),
        shape,
        floats,
        optional=(".g_idx",),
        format="int4" if bits == 4 else "dense",
        integers=integers if bits == 4 else None,
        keeps=keeps,
        looks_at=(".g_idx",),
    )
