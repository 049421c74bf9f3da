"""From records to figures. Names are those of `vllm bench serve` where it has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .drive import Step
from .per_request import Goodput, latency, peaks, tpot, ttft
from .sla import Sla, gaps
from .workload import Record

_PERCENTILES = (50, 90, 95, 99)
_KINDS = ("mean", "median", "std", *(f"p{share}" for share in _PERCENTILES))
_ERRORS = 3  # messages that are kept, with their numbers
_FEW = 20  # requests below which percentiles say little


def summarize(
    records: Sequence[Record],
    seconds: float,
    slas: Sequence[Sla],
    steps: Sequence[Step] = (),
    goodput: Goodput | None = None,
) -> dict[str, Any]:
    """Of one policy or server under one load, `seconds` from start to end. Latencies in milliseconds, rates a
    second. `effective_throughput`: requests a second that met each level of service."""
    done = [record for record in records if record.completed]
    good = {sla.name: sum(map(sla.passes, done)) for sla in slas}
    sent, made = sum(r.prompt_tokens for r in done), sum(r.count for r in done)
    facts: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": sum(1 for record in records if record.error is not None),
        "failures": Counter(r.error for r in records if r.error is not None).most_common(_ERRORS),
        "total_input_tokens": sent,
        "total_output_tokens": made,
        "request_throughput": len(done) / seconds,
        "request_goodput": sum(map(goodput.passes, done)) / seconds if goodput is not None else None,
        "output_throughput": made / seconds,
        "total_token_throughput": (sent + made) / seconds,
        **peaks(done),
        **_spread("ttft", [1e3 * ttft(r) for r in done]),
        **_spread("tpot", [1e3 * tpot(r) for r in done if r.count > 1]),
        **_spread("itl", _inner_gaps(done)),
        **_spread("e2el", [1e3 * latency(r) for r in done]),
        "effective_throughput": {name: count / seconds for name, count in good.items()},
        "steady": _steady(done, slas),
        "few_requests": len(done) < _FEW,
    }
    if steps:
        facts["steps"] = _steps(steps, seconds)
    return facts


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not len(values):
        return {f"{kind}_{name}_ms": None for kind in _KINDS}
    figures: dict[str, Any] = {"mean": np.mean(values), "median": np.median(values), "std": np.std(values)}
    figures |= {f"p{share}": np.percentile(values, share) for share in _PERCENTILES}
    return {f"{kind}_{name}_ms": float(figure) for kind, figure in figures.items()}


def _inner_gaps(done: Sequence[Record]) -> list[float]:
    """Milliseconds between tokens. As FastGen's, without the first and the last request, which run alone, and
    without each request's last gap."""
    inner = sorted(done, key=lambda record: record.sent)[1:-1] if len(done) > 2 else done
    return [1e3 * gap for record in inner for gap in gaps(record)[:-1].tolist()]


def _steady(done: Sequence[Record], slas: Sequence[Sla]) -> dict[str, Any]:
    """The same in the middle half of the run: without the rush at the start, when every client asks at once, and
    without the end, when they run out of questions."""
    if not done:
        return {}
    begin, end = min(r.sent for r in done), max(r.ended or 0.0 for r in done)
    low, high = begin + (end - begin) / 4, end - (end - begin) / 4
    inside = [r for r in done if low <= (r.ended or 0.0) < high]
    window = max(high - low, 1e-9)
    return {
        "duration": window,
        "request_throughput": len(inside) / window,
        "effective_throughput": {sla.name: sum(map(sla.passes, inside)) / window for sla in slas},
    }


def steady_of_all(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The middle halves of several runs taken together: `runs` are the `steady` of each."""
    runs = [run for run in runs if run]
    if not runs:
        return {}
    windows = [run["duration"] for run in runs]

    def mean(rates: Sequence[float]) -> float:
        return float(np.average(rates, weights=windows))

    return {
        "duration": sum(windows),
        "request_throughput": mean([run["request_throughput"] for run in runs]),
        "effective_throughput": {
            name: mean([run["effective_throughput"][name] for run in runs])
            for name in runs[0]["effective_throughput"]
        },
    }


def _steps(steps: Sequence[Step], seconds: float) -> dict[str, float]:
    times = np.array([step.seconds for step in steps])
    tokens = np.array([step.decodes + step.prefills for step in steps])
    return {
        "count": len(steps),
        "mean_ms": float(1e3 * times.mean()),
        "p99_ms": float(1e3 * np.percentile(times, 99)),
        "time_cv": float(times.std() / times.mean()),
        "tokens_mean": float(tokens.mean()),
        "busy": float(times.sum() / seconds),
    }
