"""`splitfuse bench serve`: what is measured, in which order, and where the results go."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..._core import InvalidArgument
from ..._progress import CountBar, on_terminal
from ...policies import step_tokens
from ..common import Bench, emit, open_bench, roof_facts
from .drive import Clock, Load
from .facts import sla_facts, workload_facts
from .policies import Grid, Workload, compare, forward_seconds
from .sla import Sla, published, scaled
from .tables import tables

_BASE = "prefill_first"
_LEVEL = "mid"


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    loads = [Load(rate=rate) for rate in args.rate or ()] or [Load(clients=n) for n in args.clients]
    workload = Workload(args.prompt, args.output_tokens, args.requests, args.seed)
    if args.output is not None:
        _prepare(args.output)
    with _cut_short() as cut:
        if args.url or args.replicas:
            from .remote_runs import measure_replicas, measure_urls

            measure = measure_urls if args.url else measure_replicas
            facts = asyncio.run(measure(args, options, loads, workload, cut))
        else:
            facts = _policies(args, options, loads, workload, cut)
    facts["complete"] = not cut.asked
    if args.output is not None:
        _write(facts, args.output)
    emit(facts, args.json, tables(facts))
    return 0


def _policies(
    args: argparse.Namespace,
    options: dict[str, Any],
    loads: Sequence[Load],
    workload: Workload,
    cut: Cut,
) -> dict[str, Any]:
    options = {**options, "max_step_tokens": step_tokens(*args.policies)}
    with open_bench(args.model, args.seed, options) as bench:
        bench.check_fits(min(workload.prompt + workload.output, bench.engine.query().max_model_len))
        clock = Clock()
        roof = bench.roof()
        forward = forward_seconds(bench.engine, workload.prompt, clock)
        slas = [*scaled(forward, workload.prompt), *published()]
        grid = Grid(bench.engine, args.policies, loads, workload, slas, clock, args.goodput)
        _run(grid, args.repeat, cut, f"{bench.name}: {', '.join(args.policies)}")
        facts = _facts(bench, grid, slas, workload, forward, args.save_detailed)
        facts["roof"] = roof_facts(roof.or_better(bench.roof()))
        if args.simulate and not cut.asked:
            from .simulated import simulate

            facts["simulated"] = simulate(bench, args.policies, loads, workload, roof)
        return facts


def _run(grid: Grid, repeats: int, cut: Cut, title: str) -> None:
    done, total = 0, grid.total(repeats)
    with CountBar(title, total, on_terminal()) as bar, contextlib.closing(grid.run(repeats)) as cells:
        for cell in cells:
            done += 1
            bar.update(done, f"{cell.policy}, {cell.load}")
            if cut.asked:
                return


def _facts(
    bench: Bench, grid: Grid, slas: Sequence[Sla], workload: Workload, forward: float, detailed: bool
) -> dict[str, Any]:
    cells = [cell.facts(slas, detailed) for cell in grid.cells.values()]
    return {
        "kind": "policies",
        "name": bench.name,
        "engine": bench.engine.describe(),
        "workload": workload_facts(workload),
        "forward_seconds": forward,
        "sla": sla_facts(slas),
        "cells": cells,
        "comparison": compare(cells, _BASE, _LEVEL),
    }


def _prepare(folder: Path) -> None:
    """Before minutes of measuring, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{folder}: can't be made a folder for the results: {error.strerror}") from None
    from .plots import check_matplotlib

    check_matplotlib()


def _write(facts: dict[str, Any], folder: Path) -> None:
    from .plots import draw

    (folder / "serve.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if facts["cells"]:  # else it was cut short before the first request had ended
        draw(facts, folder / "serve.png")


class Cut:
    """Whether Ctrl-C was pressed: what has been measured is reported. Pressed again, it ends at once."""

    asked = False


@contextlib.contextmanager
def _cut_short() -> Iterator[Cut]:
    cut = Cut()

    def ask(_: int, __: FrameType | None) -> None:
        if cut.asked:
            raise KeyboardInterrupt
        cut.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield cut
    finally:
        signal.signal(signal.SIGINT, before)
