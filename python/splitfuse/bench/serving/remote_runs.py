"""Runs against servers: any with OpenAI's API, or replicas of our own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..._progress import CountBar, on_terminal
from .drive import Load
from .facts import sla_facts, workload_facts
from .http_load import HttpOptions, busy_seconds, closed_loop, poisson
from .per_request import details
from .policies import Workload
from .replicas import replicas
from .report import summarize
from .sla import Sla, published, scaled
from .workload import Ask, Record, make_asks

if TYPE_CHECKING:
    from .run import Cut

_TIMES = 3  # prompts alone, of which the median first token counts
_LOOK = 0.2  # seconds between looks for Ctrl-C


async def measure_urls(
    args: argparse.Namespace, options: dict[str, Any], loads: Sequence[Load], workload: Workload, cut: Cut
) -> dict[str, Any]:
    """`options` are the engine's, which a server has chosen for itself."""
    http = _options(args)
    slas, forward = await _slas(args.url, http, workload, args)
    cells = await _cells(args.url, http, loads, workload, slas, args, cut, ", ".join(args.url))
    return _facts(", ".join(args.url), cells, slas, workload, forward)


async def measure_replicas(
    args: argparse.Namespace, options: dict[str, Any], loads: Sequence[Load], workload: Workload, cut: Cut
) -> dict[str, Any]:
    """As many servers as each number says, which share the threads, under as many clients for each."""
    from ... import _core

    http = _options(args)
    threads = options["threads"] or _core.usable_cores()
    cells: list[dict[str, Any]] = []
    scaling: list[dict[str, Any]] = []
    slas: list[Sla] = []
    forward = 0.0
    for count in args.replicas:
        with replicas(
            args.model, count, {**options, "threads": max(1, threads // max(args.replicas))}
        ) as urls:
            if not slas:
                slas, forward = await _slas(urls, http, workload, args)
            more = [
                Load(clients=load.clients and load.clients * count, rate=load.rate and load.rate * count)
                for load in loads
            ]
            found = await _cells(urls, http, more, workload, slas, args, cut, f"{count} replicas")
        cells += found
        if found:
            best = max(cell["request_throughput"] for cell in found)
            first = scaling[0]["request_throughput"] if scaling else best
            scaling.append({"replicas": count, "request_throughput": best, "times": best / first})
        if cut.asked:
            break
    return {**_facts(args.model, cells, slas, workload, forward), "scaling": scaling}


def _options(args: argparse.Namespace) -> HttpOptions:
    return HttpOptions(
        endpoint=args.endpoint, model=args.served_model_name, api_key=args.api_key, text=args.text
    )


async def _slas(
    urls: Sequence[str], http: HttpOptions, workload: Workload, args: argparse.Namespace
) -> tuple[list[Sla], float]:
    """Levels in multiples of the time to the first token of a mean prompt alone."""
    rng = range(_TIMES + 1)
    asks = [Ask(make_asks(1, workload.prompt, 1, args.vocab, 1 << 30, i, _salt())[0].prompt, 1) for i in rng]
    records: list[Record] = []
    for ask in asks:
        records += await closed_loop(urls[:1], [ask], 1, options=http, seed=0)
    for record in records:
        if not record.completed:
            raise OSError(f"{urls[0]}: {record.error}")
    per_token = statistics.median((r.tokens[0] - r.sent) / r.prompt_tokens for r in records[1:])
    forward = per_token * workload.prompt
    return [*scaled(forward, workload.prompt), *published()], forward


def _salt() -> str:
    """Servers keep prefixes: a prompt that was sent before, in this run or an earlier one, would cost nothing."""
    return secrets.token_hex(8)


async def _cells(
    urls: Sequence[str],
    http: HttpOptions,
    loads: Sequence[Load],
    workload: Workload,
    slas: Sequence[Sla],
    args: argparse.Namespace,
    cut: Cut,
    title: str,
) -> list[dict[str, Any]]:
    cells = []
    for load in loads:
        asks = workload.asks(load, args.vocab, 1 << 30, 0, _salt())
        records: list[Record] = []
        busy = await busy_seconds(urls, http)
        begin = time.perf_counter()
        with CountBar(f"{title}, {load}", len(asks), on_terminal()) as bar:
            await _run(urls, asks, load, http, records, workload.seed, cut, bar)
        seconds = time.perf_counter() - begin
        if records:
            facts = summarize(records, seconds, slas, goodput=args.goodput)
            if args.save_detailed:
                facts |= details(records)
            if busy is not None and (after := await busy_seconds(urls, http)) is not None:
                facts["steps"] = {"busy": (after - busy) / (seconds * len(urls))}
            name = title if len(urls) == 1 else f"{len(urls)} servers"
            cells.append({"policy": name, "clients": load.clients, "request_rate": load.rate, **facts})
        if cut.asked:
            break
    return cells


async def _run(
    urls: Sequence[str],
    asks: Sequence[Ask],
    load: Load,
    http: HttpOptions,
    records: list[Record],
    seed: int,
    cut: Cut,
    bar: CountBar,
) -> None:
    """Fills `records` as requests end, until all have or Ctrl-C was pressed."""

    def note(record: Record) -> None:
        records.append(record)
        bar.update(len(records))

    if load.clients is not None:
        work = closed_loop(urls, asks, load.clients, options=http, on_record=note, seed=seed)
    else:
        assert load.rate is not None
        work = poisson(urls, asks, load.rate, options=http, on_record=note, seed=seed)
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait([task], timeout=_LOOK)
        if cut.asked:
            task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _facts(
    name: str, cells: list[dict[str, Any]], slas: Sequence[Sla], workload: Workload, forward: float
) -> dict[str, Any]:
    return {
        "kind": "servers",
        "name": name,
        "workload": workload_facts(workload),
        "forward_seconds": forward,
        "sla": sla_facts(slas),
        "cells": cells,
    }
