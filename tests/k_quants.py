"""Encoders of GGUF's Q4_K and Q6_K, which the gguf package can only read: plain rounding to the range of each group."""

import numpy as np


def _rounded(x, step, low, high):
    """x / step as whole numbers in [low, high]; 0 where the step is."""
    return np.clip(np.rint(np.divide(x, step, out=np.zeros_like(x), where=step > 0)), low, high)


def _half(values):
    """As float16, its bytes [..., 2], and what they stand for."""
    half = values.astype(np.float16)
    return half[..., None].view(np.uint8), half.astype(np.float32)[..., None]


def q4_k(weights):
    """[rows, k] to bytes [rows, k / 256 * 144]: w = (d sc) q - dmin m for each 32."""
    rows, k = weights.shape
    x = weights.reshape(rows, k // 256, 8, 32)
    low = np.minimum(x.min(-1), 0)
    step = (x.max(-1) - low) / 15
    d_bytes, d = _half(step.max(-1) / 63)
    m_bytes, m = _half(-low.min(-1) / 63)
    scale = _rounded(step, np.broadcast_to(d, step.shape), 0, 63)
    minimum = _rounded(-low, np.broadcast_to(m, low.shape), 0, 63)
    wide = np.broadcast_to((d * scale)[..., None], x.shape)
    codes = _rounded(x + (m * minimum)[..., None], wide, 0, 15).astype(np.uint8)
    scale, minimum = scale.astype(np.uint8), minimum.astype(np.uint8)
    packed = [
        scale[..., :4] | scale[..., 4:] >> 4 << 6,
        minimum[..., :4] | minimum[..., 4:] >> 4 << 6,
        scale[..., 4:] & 15 | (minimum[..., 4:] & 15) << 4,
    ]
    pairs = codes.reshape(rows, k // 256, 4, 2, 32)
    both = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(rows, k // 256, 128)
    return np.concatenate([d_bytes, m_bytes, *packed, both], axis=-1).reshape(rows, -1)


def q6_k(weights):
    """[rows, k] to bytes [rows, k / 256 * 210]: w = d sc (q - 32) for each 16."""
    rows, k = weights.shape
    x = weights.reshape(rows, k // 256, 16, 16)
    step = np.abs(x).max(-1) / 31
    d_bytes, d = _half(step.max(-1) / 127)
    scale = _rounded(step, np.broadcast_to(d, step.shape), 0, 127)
    codes = _rounded(x, np.broadcast_to((d * scale)[..., None], x.shape), -32, 31) + 32
    quarters = codes.astype(np.uint8).reshape(rows, k // 256, 2, 4, 32)
    a, b, c, e = (quarters[..., i, :] for i in range(4))
    low = np.concatenate([a & 15 | (c & 15) << 4, b & 15 | (e & 15) << 4], axis=-1)
    high = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6
    scales = scale.astype(np.int8).view(np.uint8)
    blocks = [low.reshape(rows, k // 256, 128), high.reshape(rows, k // 256, 64), scales, d_bytes]
    return np.concatenate(blocks, axis=-1).reshape(rows, -1)


K_QUANTS = {"Q4_K": q4_k, "Q6_K": q6_k}
