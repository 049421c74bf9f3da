"""`splitfuse bench roofline`: what this machine could do at best."""

from __future__ import annotations

import argparse

from .. import _core
from .common import emit
from .limits import measure_roof

_DTYPES = ("float32", "bfloat16")


def run(args: argparse.Namespace) -> int:
    dtypes = _DTYPES if args.dtype == "auto" else (args.dtype,)
    threads = args.threads or _core.usable_cores()
    rows = []
    for count in sorted({1, threads}):
        for dtype in dtypes:
            roof = measure_roof(dtype, count, args.isa, args.seconds)
            rows.append(
                {
                    "dtype": dtype,
                    "threads": count,
                    "read_gbps": roof.read_gbps,
                    "peak_gflops": roof.peak_gflops,
                    "barrier_us": _core.bench.barrier_us(count),
                }
            )
    columns = ("format", "threads", "read GB/s", "GFLOP/s", "fork and join us")
    cells = [
        (
            r["dtype"],
            str(r["threads"]),
            f"{r['read_gbps']:.1f}",
            f"{r['peak_gflops']:.0f}",
            f"{r['barrier_us']:.2f}",
        )
        for r in rows
    ]
    title = f"Roof of this machine, instruction set {args.isa} (it has {', '.join(_core.cpu_isas())})"
    emit({"rows": rows, "isas": _core.cpu_isas()}, args.json, [(title, columns, cells)])
    return 0
