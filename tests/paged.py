"""Paged attention of the CPU backend on numpy arrays, and what it should give by plain attention in float64."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from splitfuse import _core

ISAS = _core.cpu_isas()
PAIRWISE = ("avx512_bf16", "neon_bf16", "neon_i8mm")  # pairs of bfloat16 are multiplied by one instruction


@dataclass(frozen=True)
class Kernel:
    dtype: str
    isa: str
    kv_dtype: str = "auto"

    @property
    def exact_cache(self) -> bool:
        return self.kv_dtype == "auto"

    def __str__(self) -> str:
        return f"{self.isa}-{self.dtype}" + ("" if self.exact_cache else f"-{self.kv_dtype}")


KERNELS = [
    Kernel(dtype, isa, kv_dtype)
    for isa in ISAS
    for dtype in ("float32", "bfloat16")
    for kv_dtype in ("auto", "int8")
    if kv_dtype == "auto"
    or isa not in PAIRWISE
    or dtype == "bfloat16"  # they have no kernels of their own there
]
OWN_KERNELS = [k for k in KERNELS if not k.isa.endswith("_vnni")]  # these attend as the rung below them
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)
own_kernels = pytest.mark.parametrize("kernel", OWN_KERNELS, ids=str)
int8_kernels = pytest.mark.parametrize("kernel", [k for k in KERNELS if not k.exact_cache], ids=str)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """What is left of the values in the format, as float32."""
    if dtype == "float32":
        return values.astype(np.float32)
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


@dataclass
class Kind:
    """What attention may have beside the plain: as AttentionShape and AttentionLayer name it."""

    window: int = 0
    pairs: int | None = None  # of dimensions that rotate; None: half of them all, 0: no rotation
    magnitude: float = 1.0
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    qk_norm: str = "none"
    norm_kind: str = "rms"
    norm_eps: float = 1e-5


class Model:
    """Attention's shape, and what one sequence's rows of qkv give by plain float64 attention."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, scale: float | None = None, kind: Kind | None = None
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.kind = kind or Kind()
        self.scale = np.float32(head_dim**-0.5 if scale is None else scale)
        pairs = head_dim // 2 if self.kind.pairs is None else self.kind.pairs
        self.inv_freq = (10000.0 ** -(np.arange(pairs) / max(pairs, 1))).astype(np.float32)
        rng = np.random.default_rng(head_dim)

        def draw(wanted: bool, count: int, low: float, high: float) -> np.ndarray | None:
            return rng.uniform(low, high, count).astype(np.float32) if wanted else None

        normed = self.kind.qk_norm != "none"
        self.slopes = draw(self.kind.alibi, heads, 0.001, 0.5)
        self.sinks = draw(self.kind.sinks, heads, -2, 4)
        self.q_norm = draw(normed, heads * head_dim, 0.5, 1.5)
        self.k_norm = draw(normed, kv_heads * head_dim, 0.5, 1.5)

    def arguments(self, layers: int = 1) -> dict[str, Any]:
        """Those of Ops.paged, the same for all layers."""
        kind = self.kind
        result: dict[str, Any] = {
            "ropes": [(self.inv_freq.tolist(), kind.magnitude)],
            "windows": [kind.window] * layers,
            "layer_ropes": [0 if len(self.inv_freq) else -1] * layers,
            "softcap": kind.softcap,
            "qk_norm": kind.qk_norm,
            "norm_kind": kind.norm_kind,
            "norm_eps": kind.norm_eps,
        }
        vectors = {
            "alibi_slopes": self.slopes,
            "sinks": self.sinks,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
        }
        return result | {name: v.tolist() for name, v in vectors.items() if v is not None}

    def qkv(self, rng: np.random.Generator, length: int) -> np.ndarray:
        return rng.standard_normal((length, (self.heads + 2 * self.kv_heads) * self.head_dim)).astype(
            np.float32
        )

    def normed(self, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """Of queries or keys [length, heads, head_dim]."""
        if weight is None:
            return x
        wide = x.astype(np.float64)
        axes = -1 if self.kind.qk_norm == "head" else (-2, -1)
        if self.kind.norm_kind == "layer":
            wide = wide - wide.mean(axes, keepdims=True)
        scale = 1 / np.sqrt((wide * wide).mean(axes, keepdims=True) + self.kind.norm_eps)
        return (wide * scale * weight.reshape(x.shape[1:])).astype(np.float32)

    def rotated(self, x: np.ndarray, dtype: str) -> np.ndarray:
        """As the contract has it: angles, their cosines and the rotation in float32, then one rounding."""
        pairs = len(self.inv_freq)
        angle = (np.arange(len(x), dtype=np.float32)[:, None] * self.inv_freq).astype(np.float64)
        cos, sin = (
            f(angle).astype(np.float32)[:, None] * np.float32(self.kind.magnitude) for f in (np.cos, np.sin)
        )
        low, high, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
        turned = np.concatenate([low * cos - high * sin, high * cos + low * sin, rest], -1)
        return rounded(turned, dtype).astype(np.float64)

    def keys_and_values(self, qkv: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Each [length, kv_heads, head_dim]."""
        x = qkv.reshape(len(qkv), -1, self.head_dim)[:, self.heads :]
        k, v = x[:, : self.kv_heads], x[:, self.kv_heads :]
        return self.rotated(self.normed(k, self.k_norm), dtype), rounded(v, dtype).astype(np.float64)

    def scores(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """[heads, length, length], -inf where a query does not see a key."""
        length = len(q)
        scores = np.einsum("qhd,khd->hqk", q, k) * np.float64(self.scale)
        if self.kind.softcap:
            scores = self.kind.softcap * np.tanh(scores / self.kind.softcap)
        distance = np.arange(length) - np.arange(length)[:, None]
        if self.slopes is not None:
            scores += self.slopes.astype(np.float64)[:, None, None] * distance
        hidden = (distance > 0) | (distance <= -(self.kind.window or length))
        return np.where(hidden, -np.inf, scores)

    def truth(
        self, qkv: np.ndarray, dtype: str, cached: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Output [length, heads * head_dim], and the same with |v|: how much rounding may matter. `cached`: keys and
        values, where they are not those of qkv."""
        length = len(qkv)
        q = self.normed(qkv.reshape(length, -1, self.head_dim)[:, : self.heads], self.q_norm)
        k, v = (
            np.repeat(y, self.heads // self.kv_heads, 1) for y in cached or self.keys_and_values(qkv, dtype)
        )
        scores = self.scores(self.rotated(q, dtype), k)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        if self.sinks is not None:
            total = total + np.exp(self.sinks.astype(np.float64)[:, None, None] - top)
        weights /= total
        out, size = (np.einsum("hqk,khd->qhd", weights, y).reshape(length, -1) for y in (v, np.abs(v)))
        return out, size


class Cache:
    """One Ops with a KV cache of `blocks` blocks, from which sequences take blocks in a random order."""

    def __init__(self, model: Model, kernel: Kernel, *, threads=2, block_size=32, blocks=48, seed=0) -> None:
        self.model, self.kernel, self.block_size, self.blocks = model, kernel, block_size, blocks
        self.ops = _core.testing.Ops(dtype=kernel.dtype, isa=kernel.isa, threads=threads)
        self.tables: list[list[int]] = []
        self.free = [int(b) for b in np.random.default_rng(seed).permutation(blocks)]

    def table(self, length: int) -> list[int]:
        self.tables.append([self.free.pop() for _ in range(-(-length // self.block_size))])
        return self.tables[-1]

    def step(self, chunks: list[tuple[int, np.ndarray, list[int]]], **layer: Any) -> list[np.ndarray]:
        """One forward of chunks (computed, rows of qkv, block table); each chunk's output."""
        out = self.ops.paged(
            heads=self.model.heads,
            kv_heads=self.model.kv_heads,
            head_dim=self.model.head_dim,
            block_size=self.block_size,
            blocks=self.blocks,
            inv_freq=self.model.inv_freq.tolist(),
            scale=float(self.model.scale),
            seqs=[(computed, len(rows), table) for computed, rows, table in chunks],
            qkv=np.concatenate([rows for _, rows, _ in chunks]),
            kv_dtype=self.kernel.kv_dtype,
            **(self.model.arguments(layer.get("layers", 1)) | layer),
        )
        return np.split(out, np.cumsum([len(rows) for _, rows, _ in chunks])[:-1])

    def int8(self, table: list[int], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The integers of a sequence's keys and values [length, kv_heads, head_dim], and the scales of each
        [length, kv_heads], as cpp/cpu/attention_kernels.h lays them out."""
        n, heads, dim, size = len(table), self.model.kv_heads, self.model.head_dim, self.block_size
        padded = -(-dim // 16) * 16
        raw = self.ops.kv_cache()[table].reshape(n, heads, -1)
        keys, values, scales = np.split(raw, [dim * size, (dim + padded) * size], axis=2)
        keys = keys.view(np.int8).reshape(n, heads, dim // 2, size, 2).transpose(0, 3, 1, 2, 4)
        values = values.view(np.int8).reshape(n, heads, size // 2, padded, 2).transpose(0, 2, 4, 1, 3)
        scales = scales.copy().view(np.float32).reshape(n, heads, 2, size).transpose(2, 0, 3, 1)
        parts = (
            keys.reshape(n * size, heads, dim),
            values.reshape(n * size, heads, padded)[..., :dim],
            *scales.reshape(2, n * size, heads),
        )
        return tuple(part[:length] for part in parts)

    def stored(self, table: list[int], length: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A sequence's keys and values as attention is to see them, where they are not those of its qkv."""
        if self.kernel.exact_cache:
            return None
        k, v, k_scale, v_scale = self.int8(table, length)
        return k * k_scale[..., None].astype(np.float64), v * v_scale[..., None].astype(np.float64)

    def run(self, sequences: list[np.ndarray], rng: np.random.Generator, largest: int) -> list[np.ndarray]:
        """Sequences side by side, in random chunks of at most `largest` rows, a random part of them in each step."""
        tables = self.tables = [self.table(len(rows)) for rows in sequences]
        outs: list[list[np.ndarray]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        while any(d < len(rows) for d, rows in zip(done, sequences, strict=True)):
            live = [i for i, rows in enumerate(sequences) if done[i] < len(rows)]
            chosen = rng.permutation(live)[: rng.integers(1, len(live) + 1)]
            chunks = []
            for i in chosen:
                length = min(
                    int(rng.integers(1, largest + 1)), len(sequences[i]) - done[i], 1000 // len(chosen)
                )
                chunks.append((done[i], sequences[i][done[i] : done[i] + length], tables[i]))
            for i, out in zip(chosen, self.step(chunks), strict=True):
                outs[i].append(out)
                done[i] += len(out)
        return [np.concatenate(parts) for parts in outs]


def assert_close(out: np.ndarray, qkv: np.ndarray, cache: Cache, table: list[int]) -> None:
    model, kernel = cache.model, cache.kernel
    stored = cache.stored(table, len(qkv))
    truth, size = model.truth(qkv, kernel.dtype, stored)
    if kernel.dtype == "float32":
        # Exponents carry the rounding of scores, which grow with the products in them.
        allowed = 4e-6 * (size + 1e-3) * (1 + float(model.scale) * model.head_dim**0.5)
    else:
        # The result is rounded to 8 bits; where pairs are multiplied, each softmax weight is too. A cosine one bit off
        # may now and then turn the rounding of a query or key.
        weights = 2.0**-8 if kernel.isa in PAIRWISE and kernel.exact_cache else 2.0**-10
        # A norm one bit off does so more often.
        turned = 0.0 if model.kind.qk_norm == "none" else 2.0**-8
        allowed = np.abs(truth) * 2.0**-8 + size * (weights + turned) + 1e-6
    if stored is not None and kernel.isa != "ref":
        # Queries, and softmax weights times scales, are rounded to 16 bits of the largest.
        allowed += size * 2.0**-12 + np.abs(stored[1]).max() * 2.0**-14
    worst = np.unravel_index(np.argmax(np.abs(out - truth) - allowed), out.shape)
    assert np.all(np.abs(out - truth) <= allowed), (worst, out[worst], truth[worst], allowed[worst])
