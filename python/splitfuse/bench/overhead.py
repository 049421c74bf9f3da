"""`splitfuse bench overhead`: what it costs to be asked over HTTP instead of in process."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from .._core import Error
from .._progress import CountBar, on_terminal
from ..policies import make_scheduler, step_tokens
from .common import Bench, Table, emit, greedy, open_bench
from .serving.http_load import HttpOptions, all_at_once, busy_seconds
from .serving.replicas import replicas
from .serving.workload import Ask, Record
from .throughput import draw_lengths

_WARM_UP = 4  # requests before the first round, of either kind
_HTTP = HttpOptions(greedy=True)

Note = Callable[[], None]


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """In turns, so that the machine's drift meets both alike; each has an engine of its own, of which one is idle."""
    engine = {**options, "max_step_tokens": step_tokens(args.policy)}
    with open_bench(args.model, args.seed, engine) as bench:
        streams = [Ask(bench.prompt(args.stream_input), args.stream_output) for _ in range(args.streams)]
        bench.check_fits(args.stream_input + args.stream_output, args.streams)
        lengths = draw_lengths(bench, args.requests, args.input, args.output)
        bench.check_fits(max(map(sum, lengths)))
        asks = [Ask(bench.prompt(read), made) for read, made in lengths]
        # "auto" is measured, and could come out differently for the other one.
        budget = bench.engine.query().token_budget
        total = 2 * args.repeat * args.requests + len(streams)
        with (
            replicas(args.model, 1, {**options, "token_budget": budget}, ["--policy", args.policy]) as (url,),
            _Bar(total) as bar,
        ):
            rounds = _rounds(bench, url, args, asks, bar.one_more)
            busy = asyncio.run(_busy(url, streams, bar.one_more))
        facts = _facts(bench, args, asks, rounds, busy)
    emit(facts, args.json, [_table(facts)])
    return 0


class _Bar(CountBar):
    def __init__(self, total: int) -> None:
        super().__init__("In process and over HTTP, in turns", total, on_terminal())
        self._done = 0

    def __enter__(self) -> _Bar:
        return self

    def one_more(self) -> None:
        self._done += 1
        self.update(self._done)


def _rounds(
    bench: Bench, url: str, args: argparse.Namespace, asks: Sequence[Ask], note: Note
) -> list[tuple[float, float]]:
    """Seconds of each round in process, and over HTTP for the same requests."""
    _in_process(bench, args.policy, asks[:_WARM_UP], _silent)
    asyncio.run(_over_http(url, asks[:_WARM_UP], _silent))
    return [
        (_in_process(bench, args.policy, asks, note), asyncio.run(_over_http(url, asks, note)))
        for _ in range(args.repeat)
    ]


def _in_process(bench: Bench, policy: str, asks: Sequence[Ask], note: Note) -> float:
    scheduler = make_scheduler(policy, bench.engine)
    begin = time.perf_counter()
    requests = [scheduler.submit(ask.prompt, greedy(ask.output), on_done=lambda _: note()) for ask in asks]
    scheduler.run_until_idle()
    seconds = time.perf_counter() - begin
    for request in requests:
        request.result(0)
    return seconds


async def _over_http(url: str, asks: Sequence[Ask], note: Note) -> float:
    """Streamed, all at once, each on a connection of its own."""
    begin = time.perf_counter()
    records = await all_at_once(url, asks, options=_HTTP, on_record=lambda _: note())
    seconds = time.perf_counter() - begin
    _check(records)
    return seconds


async def _busy(url: str, asks: Sequence[Ask], note: Note) -> float:
    """The share of the time, from the first of these streams to the last one's end, that the engine was in steps."""
    before = await busy_seconds([url], _HTTP)
    seconds = await _over_http(url, asks, note)
    after = await busy_seconds([url], _HTTP)
    assert before is not None  # it is our own server
    assert after is not None
    return (after - before) / seconds


def _check(records: Sequence[Record]) -> None:
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise Error(f"{len(failed)} of {len(records)} requests over HTTP failed: {failed[0]}")


def _silent() -> None:
    pass


def _facts(
    bench: Bench,
    args: argparse.Namespace,
    asks: Sequence[Ask],
    rounds: Sequence[tuple[float, float]],
    busy: float,
) -> dict[str, Any]:
    made = sum(ask.output for ask in asks)
    return {
        "name": bench.name,
        "engine": bench.engine.describe(),
        "policy": args.policy,
        "token_budget": bench.engine.query().token_budget,
        "requests": args.requests,
        "input_tokens": sum(len(ask.prompt) for ask in asks),
        "output_tokens": made,
        "rounds": [
            {
                "in_process_tokens_per_s": made / inside,
                "http_tokens_per_s": made / outside,
                "ratio": inside / outside,
            }
            for inside, outside in rounds
        ],
        "throughput_ratio": statistics.median(inside / outside for inside, outside in rounds),
        "streams": args.streams,
        "stream_input_tokens": args.stream_input,
        "stream_output_tokens": args.stream_output,
        "busy": busy,
    }


def _table(facts: dict[str, Any]) -> Table:
    rows = [
        (
            f"round {number}",
            f"{each['in_process_tokens_per_s']:,.1f}",
            f"{each['http_tokens_per_s']:,.1f}",
            f"{100 * each['ratio']:.1f} %",
        )
        for number, each in enumerate(facts["rounds"], 1)
    ]
    rows.append(("median", "", "", f"{100 * facts['throughput_ratio']:.1f} %"))
    rows.append((f"in steps, {facts['streams']} streams", "", "", f"{100 * facts['busy']:.1f} %"))
    title = (
        f"{facts['name']}: {facts['requests']} requests at once, {facts['input_tokens']} tokens in, "
        f"{facts['output_tokens']} out, policy {facts['policy']} (answer tokens/s); then {facts['streams']} streams, "
        f"{facts['stream_input_tokens']} tokens in and {facts['stream_output_tokens']} out each"
    )
    return title, ("", "in process", "HTTP", "ratio"), rows
