"""Policies beside each other on one engine: every policy under every load, in turns."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..._core import Engine, StepPlan
from ...policies import make_scheduler
from ...request import SamplingParams
from .drive import Clock, Drive, Load, Step
from .per_request import Goodput, details
from .report import steady_of_all, summarize
from .sla import Sla
from .workload import Ask, Record, make_asks

_WARM_UP = 3  # requests before a cell
_TIMES = 3  # forwards of which the median counts


@dataclass(frozen=True)
class Workload:
    """Mean lengths in tokens, and how many requests a run takes (None: as FastGen, by the load)."""

    prompt: int
    output: int
    requests: int | None
    seed: int

    def count(self, load: Load) -> int:
        return self.requests if self.requests is not None else load.requests

    def asks(self, load: Load, vocab_size: int, longest: int, repeat: int, salt: str = "") -> list[Ask]:
        seed = self.seed + repeat
        return make_asks(self.count(load), self.prompt, self.output, vocab_size, longest, seed, salt)


@dataclass
class Cell:
    """One policy under one load, over all its repeats."""

    policy: str
    load: Load
    goodput: Goodput | None = None
    records: list[Record] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, drive: Drive, ended: float, slas: Sequence[Sla]) -> None:
        seconds = ended - drive.started
        self.records += drive.records
        self.steps += drive.steps
        self.seconds += seconds
        self.runs.append(summarize(drive.records, seconds, slas, drive.steps, self.goodput))

    def facts(self, slas: Sequence[Sla], detailed: bool = False) -> dict[str, Any]:
        """Of all repeats together; `runs` has each. `detailed`: request by request too."""
        facts = summarize(self.records, self.seconds, slas, self.steps, self.goodput)
        facts["steady"] = steady_of_all([run["steady"] for run in self.runs])
        if detailed:
            facts |= details(self.records)
        return {
            "policy": self.policy,
            "clients": self.load.clients,
            "request_rate": self.load.rate,
            **facts,
            "runs": self.runs,
        }


class Grid:
    """All cells. `cells` is filled as they run, so what there is can be used if the rest never comes."""

    def __init__(
        self,
        engine: Engine,
        policies: Sequence[str],
        loads: Sequence[Load],
        workload: Workload,
        slas: Sequence[Sla],
        clock: Clock,
        goodput: Goodput | None = None,
    ) -> None:
        self.cells: dict[tuple[str, str], Cell] = {}
        self._engine = engine
        self._policies = policies
        self._loads = loads
        self._workload = workload
        self._slas = slas
        self._clock = clock
        self._goodput = goodput
        self._vocab_size: int = engine.model_config.vocab_size
        self._longest: int = engine.query().max_model_len

    def total(self, repeats: int) -> int:
        """Requests that `run` will make."""
        per_load = [self._workload.count(load) for load in self._loads]
        return repeats * len(self._policies) * sum(per_load)

    def run(self, repeats: int) -> Generator[Cell, None, None]:
        """Gives the cell whenever one of its requests ends. Policies take turns at each load, so that the
        machine's drift meets them alike."""
        for repeat, load, policy in itertools.product(range(repeats), self._loads, self._policies):
            cell = self.cells.setdefault((policy, str(load)), Cell(policy, load, self._goodput))
            yield from self._run_cell(cell, repeat)

    def _run_cell(self, cell: Cell, repeat: int) -> Generator[Cell, None, None]:
        workload, seed = self._workload, self._workload.seed + repeat
        warm_up = make_asks(_WARM_UP, workload.prompt, 4, self._vocab_size, self._longest, seed + 1)
        for _ in self._drive(cell.policy, warm_up, Load(clients=_WARM_UP), seed).run():
            pass
        asks = workload.asks(cell.load, self._vocab_size, self._longest, repeat)
        drive = self._drive(cell.policy, asks, cell.load, seed)
        try:
            for _ in drive.run():
                yield cell
        finally:
            ended = self._clock()
            drive.cancel()
            if drive.records:
                cell.add(drive, ended, self._slas)

    def _drive(self, policy: str, asks: Sequence[Ask], load: Load, seed: int) -> Drive:
        scheduler = make_scheduler(policy, self._engine)
        return Drive(scheduler, asks, load, clock=self._clock, seed=seed)


def forward_seconds(engine: Engine, tokens: int, clock: Clock) -> float:
    """What one prompt of that length takes alone, in one forward if the engine can, else in as few as it can."""
    most = min(tokens, engine.memory_plan.max_step_tokens)
    params = SamplingParams(max_tokens=1, temperature=0.0).to_native(max_tokens=1, seed=0)
    times = []
    for attempt in range(_TIMES + 1):  # the first warms up
        engine.put(attempt, [1 + (attempt + i) % 97 for i in range(tokens)], params)
        begin = clock()
        for done in range(0, tokens, most):
            engine.step(StepPlan([(attempt, min(most, tokens - done))]))
        times.append(clock() - begin)
        engine.flush(attempt)
    return statistics.median(times[1:])


def compare(cells: Iterable[dict[str, Any]], base: str, level: str) -> dict[str, Any]:
    """`splitfuse` beside `base`: the best effective throughput of each over all loads at one level of service,
    and, load by load, effective throughput (both, requests/s), raw throughput and the 95th percentile of the time
    between tokens."""
    by_policy: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        load = str(Load(cell["clients"], cell["request_rate"]))
        by_policy.setdefault(cell["policy"], {})[load] = cell
    ours, theirs = by_policy.get("splitfuse", {}), by_policy.get(base, {})
    shared = [load for load in ours if load in theirs]
    if not shared:
        return {}
    effective = {load: [p[load]["effective_throughput"][level] for p in (ours, theirs)] for load in shared}
    best = [max(both) for both in zip(*effective.values(), strict=True)]
    return {
        "base": base,
        "sla": level,
        "effective": best,
        "effective_ratio": best[0] / best[1] if best[1] else None,
        "effective_by_load": effective,
        "request_throughput_ratio": {
            load: ours[load]["request_throughput"] / theirs[load]["request_throughput"]
            for load in shared
            if theirs[load]["request_throughput"]
        },
        "p95_itl_ratio": {
            load: theirs[load]["p95_itl_ms"] / ours[load]["p95_itl_ms"]
            for load in shared
            if ours[load].get("p95_itl_ms") and theirs[load].get("p95_itl_ms")
        },
    }
