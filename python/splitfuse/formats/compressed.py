"""compressed-tensors: W8A8 (8-bit integers or e4m3) and W4A16, as llm-compressor writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..gguf_blocks import Integers
from ..models.family import Fields
from ..models.parts import as_float32
from . import fp8
from .packed import GROUP, Codes, dequantise, int4, unpack
from .scheme import Floats, Parts, Scheme

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def scheme(fields: Fields) -> Scheme:
    """Raises ConfigError where layers are quantised in different ways, which is not supported."""
    groups: Any = fields.get("config_groups", {})
    if not isinstance(groups, Mapping) or not groups:
        raise fields.error("config_groups: expected an object")
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in groups.values()]
    if not isinstance(weights[0], Mapping) or any(other != weights[0] for other in weights):
        raise fields.error("config_groups: one way for all weights is supported")
    how = fields.part(weights[0])
    stored = fields.get("format")
    bits, kind = how.integer("num_bits"), how.get("type")
    if stored == "pack-quantized" and kind == "int" and bits in (4, 8):
        return _packed(bits)
    if stored in ("int-quantized", "naive-quantized") and (kind, bits) == ("int", 8):
        return _int8()
    if stored in ("float-quantized", "naive-quantized") and (kind, bits) == ("float", 8):
        block = how.get("block_structure")
        return _float8(None if block is None else (int(block[0]), int(block[1])))
    raise fields.error(
        f"format is {stored!r} with weights of {bits} bits, {kind!r}; supported: {', '.join(_FORMATS)} of 8-bit "
        "integers or floats, pack-quantized of 4"
    )


def _packed(bits: int) -> Scheme:
    """Codes are packed along k, the middle added to them."""
    middle = float(1 << (bits - 1))

    def matrix(parts: Parts) -> tuple[Codes, Floats, Floats]:
        n, k = (int(size) for size in parts[".weight_shape"])
        codes = unpack(parts[".weight_packed"], bits, 1)[:n, :k]
        scales = as_float32(parts[".weight_scale"])
        zeros = np.full(scales.shape, middle, dtype=np.float32)
        if ".weight_zero_point" in parts:
            zeros = unpack(parts[".weight_zero_point"], bits, 0)[:n].astype(np.float32)
        return codes, scales, zeros

    def floats(parts: Parts) -> Floats:
        codes, scales, zeros = matrix(parts)
        order = parts.get(".weight_g_idx")
        if order is None or order.min() < 0:
            return dequantise(codes, scales, zeros)
        return (codes.astype(np.float32) - zeros[:, order]) * scales[:, order]

    def integers(parts: Parts) -> Integers | None:
        order = parts.get(".weight_g_idx")
        return int4(*matrix(parts)) if order is None or order.min() < 0 else None

    def shape(stored: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        n, words = stored[".weight_packed"]
        return n, words * (32 // bits)

    return Scheme(
        f"compressed-tensors, {bits} bits",
        ".weight_packed",
        (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
        shape,
        floats,
        optional=(".weight_zero_point", ".weight_g_idx"),
        format="int4" if bits == 4 else "dense",
        integers=integers if bits == 4 else None,
    )


def _int8() -> Scheme:
    def floats(parts: Parts) -> Floats:
        return fp8.scaled(parts[".weight"].astype(np.float32), as_float32(parts[".weight_scale"]), None)

    def integers(parts: Parts) -> Integers | None:
        codes, scale = parts[".weight"], as_float32(parts[".weight_scale"]).reshape(-1, 1)
        groups = -(-codes.shape[1] // GROUP)
        return codes, np.array(np.broadcast_to(scale, (codes.shape[0], groups)))

    return Scheme(
        "compressed-tensors, int8",
        ".weight",
        (".weight_scale", ".input_scale", ".input_zero_point"),
        fp8.shape,
        floats,
        optional=(".input_scale", ".input_zero_point"),
        dtype="I8",
        format="int8",
        integers=integers,
    )


def _float8(block: tuple[int, int] | None) -> Scheme:
    def floats(parts: Parts) -> Floats:
        return fp8.scaled(fp8.E4M3[parts[".weight"]], as_float32(parts[".weight_scale"]), block)

    return Scheme(
        "compressed-tensors, fp8",
        ".weight",
        (".weight_scale", ".input_scale"),
        fp8.shape,
        floats,
        optional=(".input_scale",),
        dtype="F8_E4M3",
    )
