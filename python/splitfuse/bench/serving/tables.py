"""The results of `splitfuse bench serve` as text."""

from __future__ import annotations

from typing import Any

from ..common import Table

_COLUMNS = (
    "", "load", "done", "req/s", "tok/s", "TTFT p50", "p95", "ITL p50", "p95", "p99", "lax", "mid", "tight", "busy",
)  # fmt: skip


def tables(facts: dict[str, Any]) -> list[Table]:
    shape = facts["workload"]
    forward = 1e3 * facts["forward_seconds"]
    title = (
        f"{facts['name']}: prompts of {shape['prompt']} tokens, answers of {shape['output']}; the forward of a mean "
        f"prompt alone takes {forward:.0f} ms (latencies in ms; lax, mid, tight: requests/s within that SLA; "
        "busy: share of the time in steps)"
    )
    found: list[Table] = [(title, _COLUMNS, [_row(cell) for cell in facts["cells"]])]
    failures = [
        (cell["policy"], _at(cell), f"{n} x", told) for cell in facts["cells"] for told, n in cell["failures"]
    ]
    if failures:
        found.append(("Requests that failed", ("", "load", "", "because"), failures))
    if "simulated" in facts:
        found.append(("The same, simulated", _COLUMNS, [_row(cell) for cell in facts["simulated"]["cells"]]))
    for name, source in (("measured", facts), ("simulated", facts.get("simulated", {}))):
        if source.get("comparison"):
            found.append(_comparison(source["comparison"], name))
    if facts.get("scaling"):
        rows = [
            (str(r["replicas"]), f"{r['request_throughput']:.2f}", f"{r['times']:.2f}x")
            for r in facts["scaling"]
        ]
        found.append(("Replicas", ("replicas", "req/s", "of the first"), rows))
    if not facts["complete"]:
        found.append(("Cut short: the figures are of what had ended.", ("",), []))
    return found


def _row(cell: dict[str, Any]) -> tuple[str, ...]:
    effective = cell["effective_throughput"]
    name = cell["policy"] + (" (few)" if cell["few_requests"] else "")
    return (
        name,
        _at(cell),
        f"{cell['completed']}" + (f" ({cell['failed']} failed)" if cell["failed"] else ""),
        f"{cell['request_throughput']:.2f}",
        f"{cell['total_token_throughput']:,.0f}",
        *(
            _ms(cell.get(key))
            for key in ("p50_ttft_ms", "p95_ttft_ms", "p50_itl_ms", "p95_itl_ms", "p99_itl_ms")
        ),
        *(f"{effective[level]:.2f}" for level in ("lax", "mid", "tight")),
        f"{100 * cell['steps']['busy']:.1f} %" if "steps" in cell else "-",
    )


def _at(cell: dict[str, Any]) -> str:
    return f"{cell['clients']}" if cell["clients"] is not None else f"{cell['request_rate']:g}/s"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _comparison(found: dict[str, Any], kind: str) -> Table:
    rows = [(f"requests/s within SLA {found['sla']}, each at its best load", _beside(*found["effective"]))]
    rows += [
        (f"requests/s within SLA {found['sla']}, {load}", _beside(*both))
        for load, both in found["effective_by_load"].items()
    ]
    rows += [
        (f"95th percentile between tokens, {load}", f"{r:.2f}x lower")
        for load, r in found["p95_itl_ratio"].items()
    ]
    rows += [
        (f"raw throughput, {load}", f"{r:.3f}x") for load, r in found["request_throughput_ratio"].items()
    ]
    return f"splitfuse beside {found['base']}, {kind}", ("", ""), rows


def _beside(ours: float, theirs: float) -> str:
    return f"{ours:.2f} : {theirs:.2f}" + (f" = {ours / theirs:.2f}x" if theirs else "")
