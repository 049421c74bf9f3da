"""How canonical weights are cut from the tensors of checkpoints, and put in order. Each takes a tensor, the model's
configuration and the number of the expert, and gives an array of the tensor's dtype; a bias goes the way of its
weight. They only slice, reshape and turn, so that no memory moves before the result is packed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .._core import ModelConfig
from .family import Array, Make


def q_rows(a: Array, c: ModelConfig, e: int = 0) -> Array:
    """Of [q, k, v], one after another."""
    return a[: c.num_heads * c.head_dim]


def k_rows(a: Array, c: ModelConfig, e: int = 0) -> Array:
    begin = c.num_heads * c.head_dim
    return a[begin : begin + c.num_kv_heads * c.head_dim]


def v_rows(a: Array, c: ModelConfig, e: int = 0) -> Array:
    begin = (c.num_heads + c.num_kv_heads) * c.head_dim
    return a[begin : begin + c.num_kv_heads * c.head_dim if len(a) >= begin else 0]


def gate_rows(a: Array, c: ModelConfig, e: int = 0) -> Array:
    """Of [gate, up], one after another."""
    return a[: len(a) // 2]


def up_rows(a: Array, c: ModelConfig, e: int = 0) -> Array:
    return a[len(a) // 2 :]


def of_head(part: int) -> Make:
    """Part 0, 1 or 2 of tensors whose heads each hold [q, k, v]."""

    def make(a: Array, c: ModelConfig, e: int = 0) -> Array:
        heads = a.reshape(c.num_heads, 3, c.head_dim, *a.shape[1:])
        return heads[:, part].reshape(-1, *a.shape[1:])

    return make


def of_group(part: int) -> Make:
    """Part 0, 1 or 2 of tensors whose groups of heads each hold [queries..., k, v]."""

    def make(a: Array, c: ModelConfig, e: int = 0) -> Array:
        queries = c.num_heads // c.num_kv_heads
        groups = a.reshape(c.num_kv_heads, queries + 2, c.head_dim, *a.shape[1:])
        which = slice(0, queries) if part == 0 else slice(queries + part - 1, queries + part)
        return groups[:, which].reshape(-1, *a.shape[1:])

    return make


def turned(make: Make | None = None) -> Make:
    """Of a matrix stored as [inputs, outputs]."""

    def turn(a: Array, c: ModelConfig, e: int = 0) -> Array:
        turned = a.T if a.ndim == 2 else a
        return turned if make is None else make(turned, c, e)

    return turn


def half_split(make: Make | None = None) -> Make:
    """Query or key rows whose rotated dimensions pair with their neighbours, in the order in which i pairs with
    i + half. A permutation of both changes no product of them."""

    def order(a: Array, c: ModelConfig, e: int = 0) -> Array:
        rows = a if make is None else make(a, c, e)
        dims = 2 * len(c.ropes[0].inv_freq)
        heads = rows.reshape(-1, c.head_dim, *rows.shape[1:])
        rotated = heads[:, :dims].reshape(len(heads), dims // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
        if dims == c.head_dim:
            return rotated.reshape(rows.shape)
        rotated = rotated.reshape(len(heads), dims, *rows.shape[1:])
        return np.concatenate([rotated, heads[:, dims:]], axis=1).reshape(rows.shape)

    return order


def one_more(make: Make | None = None) -> Make:
    """Of norms that are stored less one."""

    def add(a: Array, c: ModelConfig, e: int = 0) -> Array:
        more = as_float32(a) + np.float32(1)
        return more if make is None else make(more, c, e)

    return add


def for_queries(a: Array, c: ModelConfig, e: int = 0) -> Array:
    """A norm that all query heads share."""
    return np.tile(a, c.num_heads)


def for_keys(a: Array, c: ModelConfig, e: int = 0) -> Array:
    return np.tile(a, c.num_kv_heads)


def ones(a: Array, c: ModelConfig, e: int = 0) -> Array:
    """The weight of a norm that has none, whatever the tensor is."""
    return np.ones(c.hidden_size, np.float32)


def flat(a: Array, c: ModelConfig, e: int = 0) -> Array:
    return a.reshape(-1)


def of_expert(make: Make | None = None) -> Make:
    """Of tensors that hold all experts, one after another."""

    def pick(a: Array, c: ModelConfig, e: int = 0) -> Array:
        return a[e] if make is None else make(a[e], c, e)

    return pick


def as_float32(a: Array) -> npt.NDArray[np.float32]:
    """The numbers of an array in which uint16 are the bits of bfloat16."""
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return a.astype(np.float32)
