"""`splitfuse bench latency`: prefill of one prompt, decode at several batch sizes, and the host's own
time."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from .. import _core
from .._core import SamplingParams as NativeParams
from .._core import StepPlan
from ..scheduler import Scheduler
from .common import Bench, emit, greedy, of_roof, open_bench, roof_facts, run_to_end, spread

_HOST_SEQUENCES = 256
_HOST_STEPS = 50


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    with open_bench(args.model, args.seed, options) as bench:
        for tokens in args.prefill:
            bench.check_fits(tokens + 1)
        for batch in args.batch:
            bench.check_fits(args.context + args.steps, batch)
        roof = bench.roof()
        prefill = [_prefill(bench, tokens, args.repeat) for tokens in args.prefill]
        decode = [_decode(bench, batch, args.context, args.steps, args.repeat) for batch in args.batch]
        host = _host(bench) if args.host else None
        barrier_us = _core.bench.barrier_us(bench.threads)
        roof = roof.or_better(bench.roof())
        for row in prefill:
            row["of_roof"] = roof.seconds(bench.costs.prefill(row["tokens"])) / row["seconds"]
        for row in decode:
            row["of_roof"] = (
                roof.seconds(bench.costs.decode(row["batch"], args.context)) / row["seconds_per_step"]
            )
            row["in_barriers"] = 1e-6 * barrier_us * row["barriers"] / row["seconds_per_step"]
        facts = {
            "name": bench.name,
            "engine": bench.engine.describe(),
            "token_budget": bench.engine.query().token_budget,
            "roof": roof_facts(roof),
            "prefill": prefill,
            "decode": decode,
            "barrier_us": barrier_us,
            "host_us": host,
        }
        emit(facts, args.json, _tables(facts, args.context))
    return 0


def _prefill(bench: Bench, tokens: int, repeat: int) -> dict[str, Any]:
    """put() to the first token, nothing else running."""

    def once() -> float:
        prompt = bench.prompt(tokens)
        begin = time.perf_counter()
        bench.engine.put(0, prompt, _native(1))
        run_to_end(bench.engine)
        return time.perf_counter() - begin

    once()
    times = [once() for _ in range(repeat)]
    median = statistics.median(times)
    return {
        "tokens": tokens,
        "seconds": median,
        "best_seconds": min(times),
        "tokens_per_s": tokens / median,
    }


def _decode(bench: Bench, batch: int, context: int, steps: int, repeat: int) -> dict[str, Any]:
    """`steps` tokens for each of `batch` sequences whose context is `context` on the average of them."""
    times, step_times = [], []
    for _ in range(repeat):
        _fill(bench, batch, max(1, context - steps // 2), steps + 1)
        begin = before = time.perf_counter()
        for _ in range(steps):
            barriers = bench.engine.step().barriers
            now = time.perf_counter()
            step_times.append(now - before)
            before = now
        times.append((before - begin) / steps)
        for i in range(batch):
            bench.engine.flush(i)
    median = statistics.median(times)
    return {
        "batch": batch,
        "context": context,
        "seconds_per_step": median,
        "best_seconds_per_step": min(times),
        "step_seconds": spread(step_times),
        "barriers": barriers,
        "tokens_per_s": batch / median,
    }


def _fill(bench: Bench, batch: int, prompt: int, max_tokens: int) -> None:
    """Computes `batch` prompts up to their first token, and decodes none meanwhile: SplitFuse would, and the
    first sequences would be far ahead of the last."""
    budget = bench.engine.query().token_budget
    for i in range(batch):
        bench.engine.put(i, bench.prompt(prompt), _native(max_tokens))
        for done in range(0, prompt, budget):
            bench.engine.step(StepPlan([(i, min(budget, prompt - done))]))


def _host(bench: Bench) -> dict[str, Any]:
    """Microseconds of a step at 256 decodes that are not forward: in the engine, and in the scheduler above
    it."""
    scheduler = Scheduler(bench.engine)
    count = min(_HOST_SEQUENCES, bench.engine.query().max_sequences)
    params = greedy(2 * _HOST_STEPS)
    for _ in range(count):
        scheduler.submit(bench.prompt(4), params)
    native: list[float] = []
    python: list[float] = []
    while len(native) < _HOST_STEPS:
        begin = time.perf_counter()
        output = scheduler.step()
        took = 1e6 * (time.perf_counter() - begin)
        if output is None:
            break
        if output.decode_tokens == count:
            native.append(output.host_us)
            python.append(took - output.host_us - output.forward_us)
    scheduler.stop(drain=False)
    return {"sequences": count, "steps": len(native), "engine": spread(native), "scheduler": spread(python)}


def _native(max_tokens: int) -> NativeParams:
    return greedy(max_tokens).to_native(max_tokens=max_tokens, seed=0)


def _tables(facts: dict[str, Any], context: int) -> list[Any]:
    tables: list[Any] = [
        (
            f"{facts['name']}: prefill of one prompt, token budget {facts['token_budget']}",
            ("tokens", "ms", "best ms", "tokens/s", "of roof"),
            [
                (
                    str(r["tokens"]),
                    f"{1e3 * r['seconds']:.1f}",
                    f"{1e3 * r['best_seconds']:.1f}",
                    f"{r['tokens_per_s']:,.0f}",
                    of_roof(r["of_roof"]),
                )
                for r in facts["prefill"]
            ],
        ),
        (
            f"Decode, context {context}; threads wait for each other in {facts['barrier_us']:.2f} us",
            ("batch", "ms a step", "best ms", "p99 ms", "tokens/s", "of roof", "barriers", "in barriers"),
            [
                (
                    str(r["batch"]),
                    f"{1e3 * r['seconds_per_step']:.2f}",
                    f"{1e3 * r['best_seconds_per_step']:.2f}",
                    f"{1e3 * r['step_seconds']['p99']:.2f}",
                    f"{r['tokens_per_s']:,.1f}",
                    of_roof(r["of_roof"]),
                    str(r["barriers"]),
                    f"{100 * r['in_barriers']:.1f} %",
                )
                for r in facts["decode"]
            ],
        ),
    ]
    if facts["host_us"] is not None:
        host = facts["host_us"]
        tables.append(
            (
                f"Host time of a step, {host['sequences']} sequences decoding",
                ("where", "p50 us", "p90 us", "p99 us"),
                [
                    (where, *(f"{host[where][p]:.1f}" for p in ("p50", "p90", "p99")))
                    for where in ("engine", "scheduler")
                ],
            )
        )
    return tables
