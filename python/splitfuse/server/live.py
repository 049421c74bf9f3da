"""GET /live: what the engine does, forward by forward, as server-sent events for the page.

The first event, `hello`, says what is served. Then come `batch` events, at most ten a second: the forwards since
the one before, and how things stand. Nothing is gathered while nobody watches.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..request import Request
from .errors import ApiError
from .metrics_counts import TokenTimes
from .runtime import Runtime, StepRecord

_TICK = 0.1  # seconds between batches
_HEARTBEAT = 1.0  # seconds after which a batch is sent though nothing has happened
_WATCHERS = 16
_BATCHES = 20  # that may wait for a slow watcher; then it misses the oldest
_INBOX = 4096  # steps and ended requests that may wait for a tick
_TOLD = 60  # forwards of a batch told one by one; the others only count


def install(app: FastAPI, runtime: Runtime) -> None:
    feed = Feed(runtime)
    runtime.observers.append(feed)

    @app.get("/live", include_in_schema=False)
    async def live() -> Response:
        return _Watch(feed, feed.join())


class Feed:
    """An observer that hands on to its watchers. `join`, `leave` and what runs in between belong to the event
    loop."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._watchers: set[asyncio.Queue[str | None]] = set()
        self._inbox: deque[StepRecord | Request] = deque(maxlen=_INBOX)
        self._ticker: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------- on the engine's thread

    def on_step(self, step: StepRecord) -> None:
        if self._watchers:
            self._inbox.append(step)

    def on_end(self, request: Request) -> None:
        if self._watchers:
            self._inbox.append(request)

    # ---------------------------------------------------------------- on the loop

    def join(self) -> asyncio.Queue[str | None]:
        """A queue of events; None is the last. Raises ApiError: 429 if too many watch, 503 without an
        engine."""
        if len(self._watchers) >= _WATCHERS:
            raise ApiError(429, f"{_WATCHERS} pages watch already, as many as may", retry_after=5)
        hello = self._hello()
        queue: asyncio.Queue[str | None] = asyncio.Queue(_BATCHES)
        queue.put_nowait(_event("hello", hello))
        self._watchers.add(queue)
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._run())
        return queue

    def leave(self, queue: asyncio.Queue[str | None]) -> None:
        self._watchers.discard(queue)

    def _hello(self) -> dict[str, Any]:
        runtime = self._runtime
        model, capacity = runtime.served.engine.model_config, runtime.capacity
        assert capacity is not None  # something is served
        return {
            "model": runtime.names[0],
            "policy": runtime.settings.policy,
            "token_budget": capacity.token_budget,
            "max_sequences": capacity.max_sequences,
            "max_model_len": capacity.max_model_len,
            "blocks": capacity.total_blocks,
            "block_size": capacity.block_size,
            "vocab_size": model.vocab_size,
        }

    async def _run(self) -> None:
        """Sends batches until nobody watches any more."""
        self._inbox.clear()
        digest, said, said_at = Digest(), dict[str, Any](), 0.0
        try:
            while self._watchers and not self._runtime.draining:
                news = [self._inbox.popleft() for _ in range(len(self._inbox))]
                state, now = self._state(), time.monotonic()
                if news or state != said or now - said_at >= _HEARTBEAT:
                    said, said_at = state, now
                    self._send(_event("batch", {"now": _ms(now), **state, **digest.add(news)}))
                await asyncio.sleep(_TICK)
        finally:
            self._ticker = None
            self._send(None)

    def _state(self) -> dict[str, Any]:
        capacity, queued = self._runtime.capacity, self._runtime.queued
        assert capacity is not None  # somebody joined
        return {
            "running": capacity.running,
            "waiting": capacity.waiting + queued,
            "used": capacity.used_blocks,
            "cached": capacity.cached_blocks,
            "sick": self._runtime.sick(),
        }

    def _send(self, event: str | None) -> None:
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)


class Digest:
    """Steps and ended requests, in the engine's order, as what a page shows of them."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._times = TokenTimes()
        self._prefill_tokens = self._decode_tokens = 0

    def add(self, news: list[StepRecord | Request]) -> dict[str, Any]:
        """`steps`: the last forwards, each with its end and length `t` and `ms`, its prompt chunks `p`,
        [sequence, tokens], and its decodes `d`, sequences; `skipped`: how many came before them.
        `prefill` and `decode`: tokens computed since the watching began. `ttft`: of requests that had their
        first token; `itl`: [time, how many], of tokens after the first. All times are milliseconds."""
        told, first, gaps = deque[StepRecord](maxlen=_TOLD), [], Counter[float]()
        forwards = 0
        for item in news:
            if isinstance(item, Request):
                if self._times.on_end(item):
                    first.append(item)
                continue
            begun, step_gaps = self._times.on_step(item)
            first += begun
            for seconds, count in step_gaps:
                gaps[round(seconds * 1e3, 1)] += count
            self._prefill_tokens += item.output.prefill_tokens
            self._decode_tokens += item.output.decode_tokens
            if item.output.chunks:
                forwards += 1
                told.append(item)
        return {
            "steps": [_step(step) for step in told],
            "skipped": forwards - len(told),
            "prefill": self._prefill_tokens,
            "decode": self._decode_tokens,
            "ttft": [ms for request in first if (ms := self._first_token(request)) is not None],
            "itl": list(gaps.items()),
        }

    def _first_token(self, request: Request) -> float | None:
        """None: it came before the watching began."""
        times = request.times
        assert times.first_token is not None
        return _ms(times.first_token - times.arrived) if times.first_token >= self._began else None


class _Watch(StreamingResponse):
    """One watcher's response: it leaves the feed whatever ends it."""

    def __init__(self, feed: Feed, queue: asyncio.Queue[str | None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(queue), media_type="text/event-stream", headers=headers)
        self._feed = feed
        self._queue = queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.leave(self._queue)


async def _events(queue: asyncio.Queue[str | None]) -> AsyncIterator[str]:
    while (event := await queue.get()) is not None:
        yield event


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def _step(step: StepRecord) -> dict[str, Any]:
    """A chunk of one token that led to another is a decode, as the engine counts them."""
    sampled = set(step.output.ids.tolist())
    decodes, prompts = [], []
    for sequence, tokens in step.output.chunks:
        if tokens == 1 and sequence in sampled:
            decodes.append(sequence)
        else:
            prompts.append((sequence, tokens))
    return {"t": _ms(step.ended), "ms": _ms(step.seconds), "p": prompts, "d": decodes}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
