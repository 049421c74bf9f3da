"""The physical limits of a forward, from a model's shape and two numbers of the machine.

With d hidden size, h and g query and key-value heads of size s, f the MLP's width, L layers, V vocabulary:

    linear      Nl = L (2 d h s + 2 d g s + 3 d f)            parameters of the layers' matrices
    head        Nh = d V                                      the embedding is a gather: nothing
    KV          kvB = 2 L g s b                               bytes a token, at b bytes a number; in int8 2 L g (s + 4),
                                                              with a scale for each head's key and value
    attention   aF = 4 L h s                                  operations a pair of query and key

A forward over chunks of c tokens that begin at position s, of which `outputs` need logits, takes at least

    bytes = b (Nl + Nh) + sum of kvB (s + c)
    operations = 2 Nl (sum of c) + 2 Nh outputs + sum of aF (c s + c (c + 1) / 2)
    seconds = max(bytes / bandwidth, operations / peak)

the roofline of Williams, Waterman and Patterson (2009), with bandwidth and peak as measured by
`measure_roof`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .. import _core

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Roof:
    """What the machine can do: 1e9 bytes a second read from memory, 1e9 operations a second."""

    read_gbps: float
    peak_gflops: float

    def seconds(self, work: Work) -> float:
        """The least time for `work`, reads and arithmetic overlapped."""
        return max(work.bytes / (self.read_gbps * 1e9), work.flops / (self.peak_gflops * 1e9))

    def or_better(self, other: Roof) -> Roof:
        """The higher of each: a machine's speed drifts, and neighbours can only lower it."""
        return Roof(max(self.read_gbps, other.read_gbps), max(self.peak_gflops, other.peak_gflops))


@dataclass(frozen=True)
class Work:
    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Costs:
    """What one token, one forward and one cached token of a model cost. See the module's docstring."""

    linear_params: int
    head_params: int
    bytes_per_param: int
    kv_bytes_per_token: int
    attention_flops_per_pair: int

    @staticmethod
    def of(model: _core.ModelConfig, dtype: str, kv_dtype: str = "auto") -> Costs:
        """`dtype`: of the weights, `kv_dtype`: of the KV cache, "auto" for `dtype`."""
        q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        layer = 2 * model.hidden_size * (q + kv) + 3 * model.hidden_size * model.intermediate_size
        size = _DTYPE_BYTES[dtype]
        kv_bytes = kv * size if kv_dtype == "auto" else kv + model.num_kv_heads * _SCALE_BYTES
        return Costs(
            linear_params=model.num_layers * layer,
            head_params=model.hidden_size * model.vocab_size,
            bytes_per_param=size,
            kv_bytes_per_token=2 * model.num_layers * kv_bytes,
            attention_flops_per_pair=4 * model.num_layers * q,
        )

    @property
    def weight_bytes(self) -> int:
        """Read by every forward that needs logits."""
        return (self.linear_params + self.head_params) * self.bytes_per_param

    def forward(self, chunks: Iterable[tuple[int, int]], outputs: int) -> Work:
        """`chunks`: (position of the first token, tokens)."""
        weights = self.linear_params + (self.head_params if outputs else 0)
        read, flops = weights * self.bytes_per_param, 2 * self.head_params * outputs
        for start, count in chunks:
            read += (start + count) * self.kv_bytes_per_token
            flops += 2 * self.linear_params * count
            flops += self.attention_flops_per_pair * (count * start + count * (count + 1) // 2)
        return Work(read, flops)

    def prefill(self, tokens: int) -> Work:
        """One prompt in one forward."""
        return self.forward([(0, tokens)], 1)

    def decode(self, batch: int, context: int) -> Work:
        """One token for each of `batch` sequences that have `context` tokens."""
        return self.forward([(context, 1)] * batch, batch)

    def requests(self, lengths: Iterable[tuple[int, int]]) -> Work:
        """Whole requests, (prompt tokens, answer tokens) each, prefixes not shared: the arithmetic of all,
        and the weights once for each token of the longest answer, as no schedule can do with fewer
        forwards."""
        read = flops = 0
        forwards = 0
        for prompt, answer in lengths:
            work = self.forward([(0, prompt + answer - 1)], answer)
            flops += int(work.flops)
            read += sum(prompt + i for i in range(answer)) * self.kv_bytes_per_token
            forwards = max(forwards, answer)
        return Work(read + forwards * self.weight_bytes, flops)

    def knee(self, roof: Roof) -> float:
        """Tokens of a forward from which arithmetic, not reading the weights, takes longer."""
        return self.bytes_per_param / 2 * roof.peak_gflops / roof.read_gbps


def measure_roof(dtype: str, threads: int = 0, isa: str = "auto", seconds: float = 1.0) -> Roof:
    """Runs all threads for about `seconds` and takes the best pass."""
    best = _core.bench.roofline(dtype=dtype, threads=threads, isa=isa, seconds=seconds)
    return Roof(best["read_gbps"], best["peak_gflops"])
