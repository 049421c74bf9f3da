"""`splitfuse bench throughput`: many requests at once, offline."""

from __future__ import annotations

import argparse
import time
from typing import Any

from .._core import StepOutput
from ..policies import make_scheduler, step_tokens
from .common import Bench, Table, emit, greedy, of_roof, open_bench, percentile, roof_facts


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    options["max_step_tokens"] = step_tokens(args.policy)
    with open_bench(args.model, args.seed, options) as bench:
        lengths = draw_lengths(bench, args.requests, args.input, args.output)
        bench.check_fits(max(i + o for i, o in lengths))
        roof = bench.roof()
        _measure(bench, args.policy, lengths[:2])  # warm up
        seconds, steps, preemptions = min(
            (_measure(bench, args.policy, lengths) for _ in range(args.repeat)),
            key=lambda measured: measured[0],
        )
        roof = roof.or_better(bench.roof())
        read, made = sum(i for i, _ in lengths), sum(o for _, o in lengths)
        host = [step.host_us for step in steps]
        facts = {
            "name": bench.name,
            "engine": bench.engine.describe(),
            "policy": args.policy,
            "token_budget": bench.engine.query().token_budget,
            "roof": roof_facts(roof),
            "requests": len(lengths),
            "input_tokens": read,
            "output_tokens": made,
            "seconds": seconds,
            "output_tokens_per_s": made / seconds,
            "total_tokens_per_s": (read + made) / seconds,
            "requests_per_s": len(lengths) / seconds,
            "forwards": len(steps),
            "tokens_per_forward": (read + made - len(lengths)) / len(steps),
            "preemptions": preemptions,
            "host_us": {"p50": percentile(host, 0.5), "p99": percentile(host, 0.99)},
            "of_roof": roof.seconds(bench.costs.requests(lengths)) / seconds,
        }
        emit(facts, args.json, [_table(facts)])
    return 0


def draw_lengths(bench: Bench, count: int, read: int, made: int) -> list[tuple[int, int]]:
    """Tokens of `count` prompts and answers, of these means."""
    most = bench.engine.memory_plan.max_model_len // 2
    return [(_length(bench, read, most), _length(bench, made, most)) for _ in range(count)]


def _length(bench: Bench, mean: int, most: int) -> int:
    """Normal with a deviation of 30 %, within 1/8 and 2 times the mean."""
    low, high = max(1, mean // 8), max(1, min(most, 2 * mean))
    return max(low, min(high, round(bench.rng.gauss(mean, 0.3 * mean))))


def _measure(
    bench: Bench, policy: str, lengths: list[tuple[int, int]]
) -> tuple[float, list[StepOutput], int]:
    """Seconds from the first submission to the last token, the steps, and how often a sequence was
    preempted."""
    prompts = [bench.prompt(read) for read, _ in lengths]
    scheduler, steps, preemptions = make_scheduler(policy, bench.engine), [], 0
    begin = time.perf_counter()
    requests = [scheduler.submit(p, greedy(made)) for p, (_, made) in zip(prompts, lengths, strict=True)]
    while scheduler.has_work:
        output = scheduler.step()
        if output is not None:
            steps.append(output)
            preemptions += len(output.preempted)
    seconds = time.perf_counter() - begin
    for request in requests:
        request.result(0)
    return seconds, steps, preemptions


def _table(facts: dict[str, Any]) -> Table:
    rows = [
        ("answer tokens/s", f"{facts['output_tokens_per_s']:,.1f}"),
        ("all tokens/s", f"{facts['total_tokens_per_s']:,.1f}"),
        ("requests/s", f"{facts['requests_per_s']:.2f}"),
        ("seconds", f"{facts['seconds']:.2f}"),
        ("of roof", of_roof(facts["of_roof"])),
        ("forwards", f"{facts['forwards']}"),
        ("tokens a forward", f"{facts['tokens_per_forward']:.1f} of {facts['token_budget']}"),
        ("preemptions", f"{facts['preemptions']}"),
        ("host us a step, p50 / p99", f"{facts['host_us']['p50']:.0f} / {facts['host_us']['p99']:.0f}"),
    ]
    title = (
        f"{facts['name']}: {facts['requests']} requests at once, {facts['input_tokens']} tokens in, "
        f"{facts['output_tokens']} out, policy {facts['policy']}"
    )
    return title, ("", ""), rows
