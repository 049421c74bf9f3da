"""The physical limits of a forward, from a model's shape and two numbers of the machine.

With d hidden size, h and g query and key-value heads of size s, f the MLP's width, L layers, V vocabulary:

    linear      Nl = L (2 d h s + 2 d g s + 3 d f)            parameters of the layers' matrices; 2 d f where the MLP
                                                              has no gate
    experts     Ne = 3 d f' E                                 in place of 3 d f; a token computes with k of E, and T
                                                              tokens read about E (1 - (1 - k / E)^T) of them
    head        Nh = d V                                      the embedding is a gather: nothing
    KV          kvB = 2 L g s b                               bytes a token, at b bytes a number; in int8 2 L g (s + 4),
                                                              with a scale for each head's key and value
    attention   aF = 4 L h s                                  operations a pair of query and key

A forward over chunks of c tokens that begin at position s, of which `outputs` need logits, takes at least

    bytes = bl Nl + bh Nh + sum of kvB (s + c)                bl, bh: bytes a parameter
    operations = 2 Nl (sum of c) + 2 Nh outputs + sum of aF (c s + c (c + 1) / 2)
    seconds = max(bytes / bandwidth, operations / peak)

where the matrices are integers, their operations count against the peak of integers.

the roofline of Williams, Waterman and Patterson (2009), with bandwidth and peak as measured by
`measure_roof`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .. import _core

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_FORMAT_BYTES = {"int8": 17 / 16, "int4": 5 / 8}  # one half, or two in int4, for each 32 weights
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Roof:
    """What the machine can do: 1e9 bytes a second read from memory, 1e9 operations a second; `integer_gops`:
    of 8-bit integers, where they were measured."""

    read_gbps: float
    peak_gflops: float
    integer_gops: float = 0.0

    def seconds(self, work: Work) -> float:
        """The least time for `work`, reads and arithmetic overlapped."""
        arithmetic = work.flops / self.peak_gflops
        if work.integer_ops:
            arithmetic += work.integer_ops / self.integer_gops
        return max(work.bytes / self.read_gbps, arithmetic) / 1e9

    def or_better(self, other: Roof) -> Roof:
        """The higher of each: a machine's speed drifts, and neighbours can only lower it."""
        return Roof(
            max(self.read_gbps, other.read_gbps),
            max(self.peak_gflops, other.peak_gflops),
            max(self.integer_gops, other.integer_gops),
        )


@dataclass(frozen=True)
class Work:
    bytes: float
    flops: float
    integer_ops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.integer_ops + other.integer_ops)


@dataclass(frozen=True)
class Costs:
    """What one token, one forward and one cached token of a model cost. See the module's docstring."""

    linear_params: int
    head_params: int
    expert_params: int
    """Of one layer's experts, of which a token has `active` of `experts`, over all such layers."""
    experts: int
    active: int
    bytes_per_param: float
    bytes_per_head_param: float
    kv_bytes_per_token: int
    attention_flops_per_pair: int
    integers: bool

    @staticmethod
    def of(model: _core.ModelConfig, dtype: str, quantize: str = "dense", kv_dtype: str = "auto") -> Costs:
        """`dtype`: of activations and, unless `quantize` and `kv_dtype` say otherwise, weights and KV cache."""
        q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        matrices = (3 if model.gated else 2) * model.hidden_size
        moe = model.moe
        sparse = sum(layer.moe for layer in model.layers)
        dense = 2 * model.hidden_size * (q + kv) * model.num_layers
        dense += matrices * model.intermediate_size * (model.num_layers - sparse)
        dense += (matrices * moe.shared_intermediate_size + model.hidden_size * moe.experts) * sparse
        size = _DTYPE_BYTES[dtype]
        kv_bytes = kv * size if kv_dtype == "auto" else kv + model.num_kv_heads * _SCALE_BYTES
        integers = quantize in _FORMAT_BYTES
        return Costs(
            linear_params=dense,
            head_params=model.hidden_size * model.vocab_size,
            expert_params=matrices * moe.intermediate_size * moe.experts * sparse,
            experts=max(moe.experts, 1),
            active=moe.top_k,
            bytes_per_param=_FORMAT_BYTES.get(quantize, size),
            bytes_per_head_param=_FORMAT_BYTES["int8"] if integers else size,
            kv_bytes_per_token=2 * model.num_layers * kv_bytes,
            attention_flops_per_pair=4 * model.num_layers * q,
            integers=integers,
        )

    @property
    def weight_bytes(self) -> float:
        """Read by a forward of one token that needs logits."""
        return self._read(1) + self.head_params * self.bytes_per_head_param

    @property
    def params_per_token(self) -> float:
        """Of the layers, that a token computes with."""
        return self.linear_params + self.expert_params * self.active / self.experts

    def _read(self, tokens: int) -> float:
        """Bytes of the layers' matrices that a forward of so many tokens reads, experts as if they were drawn."""
        touched = 1 - (1 - self.active / self.experts) ** tokens
        return (self.linear_params + self.expert_params * touched) * self.bytes_per_param

    def forward(self, chunks: Iterable[tuple[int, int]], outputs: int) -> Work:
        """`chunks`: (position of the first token, tokens)."""
        chunks = list(chunks)
        read = self._read(sum(count for _, count in chunks))
        if outputs:
            read += self.head_params * self.bytes_per_head_param
        matrices, attention = 2.0 * self.head_params * outputs, 0
        for start, count in chunks:
            read += (start + count) * self.kv_bytes_per_token
            matrices += 2 * self.params_per_token * count
            attention += self.attention_flops_per_pair * (count * start + count * (count + 1) // 2)
        return Work(read, attention, matrices) if self.integers else Work(read, attention + matrices)

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
        total = Work(0, 0)
        forwards = 0
        for prompt, answer in lengths:
            work = self.forward([(0, prompt + answer - 1)], answer)
            read = sum(prompt + i for i in range(answer)) * self.kv_bytes_per_token
            total += Work(read, work.flops, work.integer_ops)
            forwards = max(forwards, answer)
        return total + Work(forwards * self.weight_bytes, 0)

    def knee(self, roof: Roof) -> float:
        """Tokens of a forward from which arithmetic, not reading the weights, takes longer."""
        peak = roof.integer_gops if self.integers else roof.peak_gflops
        return self.bytes_per_param / 2 * peak / roof.read_gbps


def measure_roof(
    dtype: str, threads: int = 0, isa: str = "auto", seconds: float = 1.0, quantize: str = "dense"
) -> Roof:
    """Runs all threads for about `seconds` and takes the best pass; the peak of integers too where the
    matrices are `quantize`d."""
    best = _core.bench.roofline(dtype=dtype, threads=threads, isa=isa, seconds=seconds)
    roof = Roof(best["read_gbps"], best["peak_gflops"])
    if quantize == "dense":
        return roof
    integers = _core.bench.roofline(
        dtype=dtype, format=quantize, threads=threads, isa=isa, seconds=seconds / 2
    )
    return roof.or_better(Roof(integers["read_gbps"], 0.0, integers["peak_gflops"]))
