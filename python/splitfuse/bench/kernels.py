"""`splitfuse bench kernels`: single operations in a model's shapes, each with its share of the roof."""

from __future__ import annotations

import argparse
from typing import Any

from .. import _core
from ..engine_setup import engine_config
from .common import emit, of_roof, roof_facts
from .limits import Roof, Work, measure_roof

_ROWS = (1, 8, 32, 128, 512)
_ATTENTION = (  # sequences, chunk, context before it
    (1, 1, 255),
    (8, 1, 255),
    (32, 1, 255),
    (1, 1, 2047),
    (1, 512, 0),
    (1, 512, 1536),
)


def run(args: argparse.Namespace) -> int:
    from ..loader import load

    loaded = load(args.model)
    dtype = engine_config(dtype=args.dtype).dtype
    how = {"dtype": dtype, "threads": args.threads or 0, "isa": args.isa}
    quantize = loaded.quantize_as(args.quantize)
    roof = measure_roof(**how, quantize=quantize)
    linear = [
        _linear(shape, rows, quantize, how, args.seconds)
        for shape in _shapes(loaded.config)
        for rows in _ROWS
    ]
    attention_how = {**how, "kv_dtype": args.kv_dtype}
    attention = [_attention(loaded.config, case, attention_how, args.seconds) for case in _ATTENTION]
    roof = roof.or_better(measure_roof(**how, quantize=quantize))
    for row in linear:
        row["of_roof"] = _share(row, roof, quantize != "dense")
    for row in attention:
        row["of_roof"] = _share(row, roof, False)
    weights = dtype if quantize == "dense" else quantize
    title = f"{loaded.name} in {weights}: linear layers, weights from memory"
    tables = [
        (
            title,
            ("layer", "N x K", "rows", *_MEASURED),
            [_cells(r, (r["layer"], r["shape"], r["rows"])) for r in linear],
        ),
        (
            "Attention, one layer; the share can pass 100 % as its keys and values may lie in a cache",
            ("sequences", "chunk", "context", *_MEASURED),
            [_cells(r, (r["sequences"], r["chunk"], r["context"])) for r in attention],
        ),
    ]
    emit(
        {
            "name": loaded.name,
            **attention_how,
            "roof": roof_facts(roof),
            "linear": linear,
            "attention": attention,
        },
        args.json,
        tables,
    )
    return 0


_MEASURED = ("us", "GFLOP/s", "GB/s", "of roof")


def _cells(row: dict[str, Any], head: tuple[Any, ...]) -> tuple[str, ...]:
    measured = (f"{row['us']:.1f}", f"{row['gflops']:.1f}", f"{row['gbps']:.1f}", of_roof(row["of_roof"]))
    return (*map(str, head), *measured)


def _shapes(config: _core.ModelConfig) -> list[tuple[str, int, int, bool]]:
    """(name, N, K, gated) of every linear layer, gate and up as the one operation they are."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, wide = config.hidden_size, config.intermediate_size
    return [
        ("qkv", q + 2 * kv, hidden, False),
        ("o", hidden, q, False),
        ("gate, up", wide, hidden, True),
        ("down", hidden, wide, False),
        ("head", config.vocab_size, hidden, False),
    ]


def _linear(
    shape: tuple[str, int, int, bool], rows: int, quantize: str, how: dict[str, Any], seconds: float
) -> dict[str, Any]:
    name, n, k, gated = shape
    form = "int8" if name == "head" and quantize == "int4" else quantize
    got = _core.bench.linear_us(n=n, k=k, gated=gated, rows=rows, format=form, seconds=seconds, **how)
    return {"layer": name, "shape": f"{n} x {k}", "rows": rows, **got}


def _attention(
    config: _core.ModelConfig, case: tuple[int, int, int], how: dict[str, Any], seconds: float
) -> dict[str, Any]:
    sequences, chunk, context = case
    got = _core.bench.attention_us(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        context=context,
        seqs=sequences,
        chunk=chunk,
        seconds=seconds,
        **how,
    )
    return {"sequences": sequences, "chunk": chunk, "context": context, **got}


def _share(got: dict[str, float], roof: Roof, integers: bool) -> float:
    """Time at the roof over time taken; beyond 1 where the data lay in a cache."""
    seconds = got["us"] * 1e-6
    read, operations = got["gbps"] * 1e9 * seconds, got["gflops"] * 1e9 * seconds
    work = Work(read, 0.0, operations) if integers else Work(read, operations)
    return roof.seconds(work) / seconds
