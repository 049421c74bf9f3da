"""The same cells on a simulated engine: the policies' own code, and time from a measured cost of forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..common import Bench
from ..limits import Roof
from .drive import Clock, Load
from .policies import Grid, Workload, compare, forward_seconds
from .simulator import CurveCost, SimulatedEngine, VirtualClock
from .sla import scaled

_SIZES = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)


class SimulatedClock(Clock):
    """Drives see the engine's clock, and let it pass where nothing happens."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def __call__(self) -> float:
        return self._clock.now

    def wait_until(self, moment: float) -> None:
        self._clock.advance(max(0.0, moment - self._clock.now))


def simulate(
    bench: Bench, policies: Sequence[str], loads: Sequence[Load], workload: Workload, roof: Roof
) -> dict[str, Any]:
    """`bench` gives the cost of a forward by its tokens, measured now; reading cached keys and values costs what
    the memory's roof says."""
    plan, capacity = bench.engine.memory_plan, bench.engine.query()
    clock = Clock()
    sizes = [size for size in _SIZES if size <= min(plan.max_step_tokens, plan.max_model_len - 1)]
    points = [(size, forward_seconds(bench.engine, size, clock)) for size in sizes]
    kv_seconds = plan.kv_bytes_per_token / (roof.read_gbps * 1e9)
    virtual = VirtualClock()
    engine = SimulatedEngine(
        CurveCost(points, kv_seconds_per_token=kv_seconds),
        virtual,
        token_budget=capacity.token_budget,
        max_step_tokens=plan.max_step_tokens,
        max_sequences=capacity.max_sequences,
        max_model_len=plan.max_model_len,
        blocks=capacity.total_blocks,
        block_size=capacity.block_size,
        vocab_size=bench.engine.model_config.vocab_size,
    )
    return simulate_on(engine, SimulatedClock(virtual), policies, loads, workload)


def simulate_on(
    engine: SimulatedEngine,
    clock: SimulatedClock,
    policies: Sequence[str],
    loads: Sequence[Load],
    workload: Workload,
) -> dict[str, Any]:
    forward = forward_seconds(engine, workload.prompt, clock)  # type: ignore[arg-type]
    slas = scaled(forward, workload.prompt)
    grid = Grid(engine, policies, loads, workload, slas, clock)  # type: ignore[arg-type]
    for _ in grid.run(1):
        pass
    cells = [cell.facts(slas) for cell in grid.cells.values()]
    return {
        "forward_seconds": forward,
        "cells": cells,
        "comparison": compare(cells, "prefill_first", "mid"),
    }
