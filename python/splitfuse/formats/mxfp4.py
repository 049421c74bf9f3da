"""MXFP4 (GPT-OSS): 32 values of 4 bits, e2m1, share a power of two. A tensor holds the matrices of all experts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..models.family import Fields
from .scheme import Parts, Scheme, Shapes

# Open Compute Project, Microscaling Formats v1.0: sign, two bits of exponent, one of mantissa.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def _floats(parts: Parts) -> npt.NDArray[np.uint16]:
    """[experts, inputs, outputs], as transformers keeps them; bfloat16 holds each value exactly."""
    blocks, scales = parts["_blocks"], parts["_scales"]
    experts, rows = blocks.shape[:2]
    out = np.empty((experts, rows, blocks.shape[2] * 32), dtype=np.uint16)
    for expert in range(experts):
        codes = np.stack([blocks[expert] & 15, blocks[expert] >> 4], axis=-1).reshape(rows, -1, 32)
        values = np.ldexp(_E2M1[codes], scales[expert].astype(np.int32)[..., None] - 127)
        out[expert] = (values.view(np.uint32) >> 16).astype(np.uint16).reshape(rows, -1)
    return out.transpose(0, 2, 1)


def _shape(stored: Shapes) -> tuple[int, ...]:
    experts, rows, groups, half = stored["_blocks"]
    if half != 16 or stored["_scales"] != (experts, rows, groups):
        raise ValueError(stored)
    return experts, groups * 32, rows


def scheme(fields: Fields) -> Scheme:
    return Scheme("mxfp4", "_blocks", ("_scales",), _shape, _floats, weight="", reused=2)
