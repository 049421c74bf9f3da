"""Clients without threads or sockets: what they do next is decided in the scheduler's callbacks.

So one engine, real or simulated, can be measured under one policy after the other, and nothing but the policy
differs.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..._core import StepOutput
from ...request import Delta, Request, SamplingParams
from ...scheduler import Scheduler
from .workload import Ask, Record

_JITTER = 0.01  # seconds a client, that starts are spread over, as FastGen's were
_WAIT = 0.0005  # seconds of sleep while nobody has anything to do


@dataclass(frozen=True, slots=True)
class Step:
    """One forward. Times as in `Record`."""

    ended: float
    seconds: float
    decodes: int
    prefills: int


class Clock:
    """Time as it passes, and how to let it pass where there is nothing to do."""

    def __call__(self) -> float:
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, min(_WAIT, moment - self())))


@dataclass(frozen=True)
class Load:
    """`clients` that ask again as soon as they were answered, or, if it is None, arrivals at `rate` a second
    whose gaps are exponential."""

    clients: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.clients} clients" if self.clients is not None else f"{self.rate:g}/s"

    @property
    def requests(self) -> int:
        """As many as FastGen took."""
        return 4 * self.clients + 32 if self.clients is not None else 64

    def first_arrivals(self, count: int, seed: int) -> list[float]:
        """Seconds from the start: of each client's first request, or of every request."""
        rng = random.Random(seed)
        if self.clients is not None:
            return sorted(rng.uniform(0, self.clients * _JITTER) for _ in range(min(self.clients, count)))
        assert self.rate is not None
        moments, moment = [], 0.0
        for _ in range(count):
            moment += rng.expovariate(self.rate)
            moments.append(moment)
        return moments


class Drive:
    """One policy under one load. `records` and `steps` hold what has been done so far."""

    def __init__(
        self, scheduler: Scheduler, asks: Sequence[Ask], load: Load, *, clock: Clock, seed: int
    ) -> None:
        self.records: list[Record] = []
        self.steps: list[Step] = []
        self.started = clock()
        self._scheduler = scheduler
        self._clock = clock
        self._asks = iter(asks)
        self._again = load.clients is not None
        arrivals = load.first_arrivals(len(asks), seed)
        self._due = [(self.started + moment, number) for number, moment in enumerate(arrivals)]
        heapq.heapify(self._due)

    def run(self) -> Iterator[Record]:
        """Gives each request as it ends. Leaving it early keeps what there is; `cancel` then frees the rest."""
        given = 0
        ended: list[Record] = []
        while self._due or self._scheduler.has_work:
            self._send_due(ended.append)
            before = self._clock()
            output = self._scheduler.step()
            if output is not None and output.chunks:
                self._note(output, before)
            elif self._due and not self._scheduler.has_work:
                self._clock.wait_until(self._due[0][0])
            yield from ended[given:]
            given = len(ended)

    def cancel(self) -> None:
        """Requests that have not ended are no result: they leave `records`."""
        self.records = [record for record in self.records if record.ended is not None]
        self._due.clear()
        self._asks = iter(())
        self._scheduler.stop(drain=False)

    def _note(self, output: StepOutput, before: float) -> None:
        now = self._clock()
        self.steps.append(Step(now, now - before, output.decode_tokens, output.prefill_tokens))

    def _send_due(self, done: Callable[[Record], None]) -> None:
        while self._due and self._due[0][0] <= self._clock():
            # The wait for the step during which it came is part of its latency.
            moment, _ = heapq.heappop(self._due)
            self._send(done, moment)

    def _send(self, done: Callable[[Record], None], sent: float) -> None:
        ask = next(self._asks, None)
        if ask is None:
            return
        record = Record(len(ask.prompt), ask.output, sent)
        self.records.append(record)

        def on_output(_: Request, delta: Delta) -> None:
            record.tokens.append(self._clock())

        def on_done(request: Request) -> None:
            record.ended = self._clock()
            if request.error is not None:
                record.error = str(request.error)
            elif len(record.tokens) < record.output_tokens:
                record.error = "ended early"
            done(record)
            if self._again:
                self._send(done, self._clock())

        self._scheduler.submit(ask.prompt, _params(ask), on_output=on_output, on_done=on_done)


def _params(ask: Ask) -> SamplingParams:
    """FastGen's sampling, with the answer's length forced."""
    return SamplingParams(max_tokens=ask.output, temperature=1.0, top_p=0.9, ignore_eos=True, seed=0)
