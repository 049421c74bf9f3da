"""A server over the fake engine, stepped by hand on a clock of the test's own, and what its /metrics say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import FakeEngine, FakeTokenizer
from splitfuse import SamplingParams, Scheduler
from splitfuse.server import metrics
from splitfuse.server.runtime import Runtime, Served
from splitfuse.server.settings import Settings
from splitfuse.server.stream import Stream

E2E = ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
ITL = ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"
TTFT = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
TOKENS = "1 2 5 10 20 50 100 200 500 1000 2000 5000 10000 20000 50000 100000 200000 500000 1000000"
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": TTFT,
    "vllm:inter_token_latency_seconds": ITL,
    "vllm:request_time_per_output_token_seconds": ITL,
    "vllm:e2e_request_latency_seconds": E2E,
    "vllm:request_queue_time_seconds": E2E,
    "vllm:request_inference_time_seconds": E2E,
    "vllm:request_prefill_time_seconds": E2E,
    "vllm:request_decode_time_seconds": E2E,
    "vllm:request_prompt_tokens": TOKENS,
    "vllm:request_generation_tokens": TOKENS,
    "vllm:request_max_num_generation_tokens": TOKENS,
    "vllm:request_num_preemptions": "1 2 3 4 5 10 20",
    "vllm:request_params_n": "1 2 5 10 20",
    "vllm:request_params_max_tokens": TOKENS,
    "vllm:iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
    "splitfuse:step_seconds": ".0005 .001 .0025 .005 .01 .025 .05 .1 .25 .5 1 2.5 5 10",
    "splitfuse:budget_use": ".01 .05 .1 .2 .3 .4 .5 .6 .7 .8 .9 .95 1",
}


class Clock:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class TimedEngine(FakeEngine):
    """Every forward takes `seconds`."""

    clock: Clock = field(default_factory=Clock)
    seconds: float = 0.125
    used: int = 0
    cached: int = 0
    queries: int = 0
    hits: int = 0
    preempts: Sequence[int] = ()

    def query(self, seq_id: int | None = None) -> Any:
        if seq_id is not None:
            return SimpleNamespace(cached=self.sequences[seq_id].hit)
        waiting = sum(s.computed == 0 for s in self.sequences.values())
        return SimpleNamespace(
            **vars(super().query()),
            total_blocks=64,
            free_blocks=64 - self.used,
            cached_blocks=self.cached,
            used_blocks=self.used,
            block_size=16,
            running=len(self.sequences) - waiting,
            waiting=waiting,
            prefix_queries=self.queries,
            prefix_hits=self.hits,
        )

    def put(self, seq_id: int, tokens: Sequence[int], params: Any, *rest: Any) -> None:
        super().put(seq_id, tokens, params, *rest)
        self.sequences[seq_id].hit = 0

    def step(self, plan: Any = None) -> Any:
        for s in self.sequences.values():
            if s.computed == 0 and (s.salt, tuple(s.tokens)) in self._prefixes:
                s.hit = s.prompt - 1
        fresh = {s.id: s.prompt for s in self.sequences.values() if s.computed == 0}
        self.clock.now += self.seconds
        output = super().step(plan)
        self.queries += sum(fresh.get(seq_id, 0) for seq_id, _ in output.chunks)
        self.hits += output.cached_tokens
        output.host_us, output.forward_us = 0.0, self.seconds * 1e6
        output.preempted, self.preempts = list(self.preempts), ()
        return output


class ByHand(Scheduler):
    def start(self) -> None:
        """The test steps."""


class Scripted(Runtime):
    def __init__(self, make: Callable[[], Any], scheduler: type[Scheduler] = ByHand, **settings: Any) -> None:
        super().__init__(Settings("fake", **settings))
        self.make, self.scheduler_type = make, scheduler
        self.app = FastAPI()
        metrics.install(self.app, self)

    def _load(self) -> Served:
        engine = self.make()
        scheduler = self.scheduler_type(
            engine,
            FakeTokenizer(),
            max_queued=self.settings.limits.queued,
            max_queued_tokens=self.settings.limits.queued_tokens,
            on_step=lambda output: self._on_step(scheduler, output),
            on_failure=lambda error: self._on_failure(scheduler, error),
        )
        return Served(SimpleNamespace(name="fake", tokenizer=FakeTokenizer()), engine, scheduler)

    def ask(self, prompt: Sequence[int] | int, streamed: bool = False, **params: Any) -> Stream:
        """`prompt`: ids, or how many."""
        ids = list(prompt) if not isinstance(prompt, int) else [1 + i % 90 for i in range(prompt)]
        return self.submit(ids, SamplingParams(temperature=0, **params), streamed=streamed)

    async def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.served.scheduler.step()
            await asyncio.sleep(0)

    async def drain(self) -> None:
        while self.served.scheduler.has_work:
            await self.step()

    async def get(self, accept: str = "") -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/metrics", headers={"Accept": accept})

    async def scrape(self) -> Page:
        response = await self.get()
        assert response.status_code == 200
        return Page(response.text)


class Page:
    """One scrape. page["name"], page["name", "label=value"]: a sample's value."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def __getitem__(self, key: str | tuple[str, str]) -> float:
        name, label = key if isinstance(key, tuple) else (key, "=")
        wanted, _, value = label.partition("=")
        found = [s.value for s in self.samples if s.name == name and s.labels.get(wanted, "") == value]
        assert len(found) == 1, f"{len(found)} samples of {key}"
        return found[0]

    def labels(self, name: str) -> dict[str, str]:
        (sample,) = [s for s in self.samples if s.name == name]
        return sample.labels

    def holds(self, name: str, values: Sequence[float]) -> None:
        """The histogram `name` has seen just these values."""
        assert self[f"{name}_count"] == len(values), name
        assert self[f"{name}_sum"] == pytest.approx(sum(values), rel=1e-12), name
        bounds = [s.labels["le"] for s in self.samples if s.name == f"{name}_bucket"]
        assert [float(b) for b in bounds] == [*map(float, HISTOGRAMS[name].split()), float("inf")], name
        for bound in bounds:
            expected = sum(value <= float(bound) for value in values)
            assert self[f"{name}_bucket", f"le={bound}"] == expected, (name, bound)


@asynccontextmanager
async def serving(clock: Clock, **options: Any) -> AsyncIterator[Scripted]:
    """`options`: those of TimedEngine that it knows, else of Settings."""
    known = {f.name: options.pop(f.name) for f in fields(TimedEngine) if f.name in options}
    runtime = Scripted(lambda: TimedEngine(clock=clock, **known), **options)
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.stop()
