"""The results of `splitfuse bench serve` as one page of plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..._core import ConfigError

_COLORS = {
    "splitfuse": "#0b6e4f",
    "even": "#5aa786",
    "mlfq": "#7a5195",
    "prefill_first": "#d1495b",
    "orca": "#edae49",
    "static_chunk": "#30638e",
    "static_batch": "#8d99ae",
}
_LEVELS = ("lax", "mid", "tight")


def check_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'splitfuse[bench]'") from None


def draw(facts: dict[str, Any], file: Path) -> None:
    """Six panels: latency over throughput, effective throughput at three levels of service, the time between
    tokens, and first tokens or, where servers were scaled, replicas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3)
    series = _series(facts["cells"])
    dashed = _series(facts.get("simulated", {}).get("cells", []))
    _lines(
        panels[0][0], series, dashed, lambda c: c["request_throughput"], lambda c: _seconds(c["p50_e2el_ms"])
    )
    panels[0][0].set(
        title="Throughput and latency\nright and low is better", xlabel="requests/s", ylabel="latency, p50, s"
    )
    _lines(panels[0][1], series, dashed, _load, lambda c: c["p95_itl_ms"])
    panels[0][1].set(title="95th percentile between two tokens\nlow is smooth", ylabel="ms", yscale="log")
    if facts.get("scaling"):
        _scaling(panels[0][2], facts["scaling"])
    else:
        _lines(panels[0][2], series, dashed, _load, lambda c: _seconds(c["p95_ttft_ms"]))
        panels[0][2].set(title="95th percentile of the first token", ylabel="s")
    for axes, level in zip(panels[1], _LEVELS, strict=True):
        _lines(axes, series, dashed, _load, lambda c, level=level: c["effective_throughput"][level])  # type: ignore[misc]
        axes.set(title=f"Requests/s within the SLA: {level}", ylabel="requests/s", ylim=(0, None))
    for axes in (panels[0][1], *panels[1], *([] if facts.get("scaling") else [panels[0][2]])):
        axes.set_xlabel(
            "clients" if facts["cells"][0]["clients"] is not None else "requests asked for a second"
        )
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False)
    shape = facts["workload"]
    note = "; dashed: simulated" if dashed else ""
    figure.suptitle(
        f"{facts['name']}: prompts of {shape['prompt']} tokens, answers of {shape['output']} "
        f"(normal, 30 %){note}\n{facts.get('engine', '')}"
    )
    figure.savefig(file, dpi=110)


Series = dict[str, list[dict[str, Any]]]


def _series(cells: list[dict[str, Any]]) -> Series:
    found: Series = {}
    for cell in cells:
        if cell["completed"]:
            found.setdefault(cell["policy"], []).append(cell)
    return found


def _lines(
    axes: Any,
    series: Series,
    dashed: Series,
    x: Callable[[dict[str, Any]], Any],
    y: Callable[[dict[str, Any]], Any],
) -> None:
    for name, cells in series.items():
        axes.plot([x(c) for c in cells], [y(c) for c in cells], "o-", color=_COLORS.get(name), label=name)
    for name, cells in dashed.items():
        axes.plot([x(c) for c in cells], [y(c) for c in cells], "--", color=_COLORS.get(name), alpha=0.6)


def _scaling(axes: Any, rows: list[dict[str, Any]]) -> None:
    counts = [row["replicas"] for row in rows]
    axes.bar([str(count) for count in counts], [row["request_throughput"] for row in rows], color="#30638e")
    axes.set(title="Throughput by replicas", xlabel="replicas", ylabel="requests/s")


def _load(cell: dict[str, Any]) -> float:
    return float(cell["clients"] if cell["clients"] is not None else cell["request_rate"])


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
