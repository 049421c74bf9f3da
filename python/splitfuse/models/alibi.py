"""Attention with linear biases (arXiv:2108.12409): what a head takes off a score per token of distance."""

from __future__ import annotations


def slopes(heads: int) -> list[float]:
    """Powers of 2^(-8 / n), where n is the largest power of 2 not above `heads`; the heads beyond n have the odd powers
    of that base's root."""
    n = 1 << (heads.bit_length() - 1) if heads > 0 else 1
    first = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    return first + [2.0 ** (-4 * i / n) for i in range(1, 2 * (heads - n) + 1, 2)]
