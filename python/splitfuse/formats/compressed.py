"""compressed-tensors: W8A8 (8-bit integers or e4m3) and W4A16, as llm-compressor writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..gguf_blocks import Integers
from ..models.family import Fields
from ..models.parts import as_float32
from . import fp8
from .packed import GROUP, Codes, dequantise, in_groups, int4, unpack
from .scheme import Floats, Parts, Scheme, Shapes

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def scheme(fields: Fields) -> Scheme:
    """Raises ConfigError where layers are quantised in different ways, which is not supported."""
    groups: Any = fields.get("config_groups", {})
    if not isinstance(groups, Mapping) or not groups:
        raise fields.error("config_groups: expected an object")
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in groups.values()]
    if not isinstance(weights[0], Mapping) or any(other != weights[0] for other in weights):
        raise fields.error("config_groups: one way for all weights is supported")
    fields.expect("transform_config", {})
    sparsity = fields.part(fields.get("sparsity_config") or {})
    sparsity.expect("format", "dense")
    how = fields.part(weights[0])
    stored = fields.get("format")
    bits, kind = how.integer("num_bits"), how.get("type")
    if stored == "pack-quantized" and kind == "int" and bits in (4, 8):
        return _packed(bits)
    if stored in ("int-quantized", "naive-quantized") and (kind, bits) == ("int", 8):
        how.expect("symmetric", True)
        how.expect("strategy", "channel", "tensor")
        return _int8()
    if stored in ("float-quantized", "naive-quantized") and (kind, bits) == ("float", 8):
        return fp8.of_blocks("compressed-tensors, fp8", fp8.block_size(how, "block_structure"))
    raise fields.error(
        f"format is {stored!r} with weights of {bits} bits, {kind!r}; supported: {', '.join(_FORMATS)} of 8-bit "
        "integers or floats, pack-quantized of 4"
    )


def _packed(bits: int) -> Scheme:
    """Codes are packed along k, the middle added to them."""
    middle = float(1 << (bits - 1))

    def matrix(parts: Parts) -> tuple[Codes, Floats, Floats]:
        n, k = (int(size) for size in parts[".weight_shape"])
        codes = unpack(parts[".weight_packed"], bits, 1)[:, :k]
        if codes.shape != (n, k):
            raise ValueError(f"weight_shape is {[n, k]}, the codes are of {list(codes.shape)}")
        scales = as_float32(parts[".weight_scale"])
        zeros = np.full(scales.shape, middle, dtype=np.float32)
        if ".weight_zero_point" in parts:
            zeros = unpack(parts[".weight_zero_point"], bits, 0)[:n].astype(np.float32)
        return codes, scales, zeros

    def floats(parts: Parts) -> Floats:
        codes, scales, zeros = matrix(parts)
        if not ordered(parts):
            return dequantise(codes, scales, zeros)
        order = parts[".weight_g_idx"]
        if order.max() >= scales.shape[1]:
            raise ValueError(f"weight_g_idx names group {order.max()} of {scales.shape[1]}")
        return (codes.astype(np.float32) - zeros[:, order]) * scales[:, order]

    def ordered(parts: Parts) -> bool:
        """Whether inputs have groups of their own choice; -1 says that they don't."""
        return ".weight_g_idx" in parts and parts[".weight_g_idx"].min() >= 0

    def integers(parts: Parts) -> Integers:
        return int4(*matrix(parts))

    def keeps(stored: Shapes, parts: Parts) -> bool:
        return not ordered(parts) and in_groups(shape(stored)[1], stored[".weight_scale"][1])

    def shape(stored: Shapes) -> tuple[int, int]:
        n, words = stored[".weight_packed"]
        k, (rows, groups) = words * (32 // bits), stored[".weight_scale"]
        zeros = stored.get(".weight_zero_point", (-(-n * bits // 32), groups))
        if rows != n or zeros != (-(-n * bits // 32), groups) or stored.get(".weight_g_idx", (k,)) != (k,):
            raise ValueError(stored)
        if ".weight_g_idx" not in stored and k % groups:
            raise ValueError(stored)
        return n, k

    return Scheme(
        f"compressed-tensors, {bits} bits",
        ".weight_packed",
        (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
        shape,
        floats,
        optional=(".weight_zero_point", ".weight_g_idx"),
        format="int4" if bits == 4 else "dense",
        integers=integers if bits == 4 else None,
        keeps=keeps,
        looks_at=(".weight_g_idx",),
    )


def _int8() -> Scheme:
    def floats(parts: Parts) -> Floats:
        return fp8.scaled(parts[".weight"].astype(np.float32), as_float32(parts[".weight_scale"]), None)

    def integers(parts: Parts) -> Integers:
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
