"""What the metrics count. It happens on the engine's thread, so a step is counted as a whole, not token by token."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..request import Request
    from ..scheduler import Scheduler
    from .runtime import StepRecord

# The upper bounds of vLLM's buckets, so that its dashboards and alerts fit.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, *(2**i for i in range(3, 15)))
_ANSWERS = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
# vLLM ends these at the model's context; one list for all models can be added up over them.
_TOKENS = (*(m * 10**e for e in range(6) for m in (1, 2, 5)), 10**6)
# Our own.
_STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SHARE = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

_ERROR = 3  # StepOutput.finish
_KEPT = 1024  # sequences remembered before it is looked which of them are gone


class Histogram:
    """How many values lay at or below each of `bounds`, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Not cumulative; the last: beyond every bound."""
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class TokenTimes:
    """When sequences have their tokens: which requests have their first, and how long the others waited."""

    def __init__(self) -> None:
        self._scheduler: Scheduler | None = None  # the one of the last step
        self._last: dict[int, float] = {}  # when a sequence had its latest token
        self._limit = _KEPT
        self._begun: set[Request] = set()  # those that live and whose first token has been told

    def on_step(self, step: StepRecord) -> tuple[list[Request], list[tuple[float, int]]]:
        """The requests whose first token this step made and that go on; and (seconds since the token before,
        how many sequences): those that were together in the step before share one entry."""
        if step.scheduler is not self._scheduler:  # another engine, which numbers its sequences anew
            self._scheduler, self._last = step.scheduler, {}
        last, output = self._last, step.output
        ids: list[int] = output.ids[output.finish != _ERROR].tolist()
        before = Counter(map(last.get, ids))
        first = [sequence for sequence in ids if sequence not in last] if before.pop(None, 0) else []
        last.update(dict.fromkeys(ids, step.ended))
        if len(last) > self._limit:
            self._forget(step)
        begun = {request for i in first if (request := step.scheduler.request_of(i))} - self._begun
        self._begun |= begun
        return list(begun), [(step.ended - time, count) for time, count in before.items() if time is not None]

    def on_end(self, request: Request) -> bool:
        """Whether its first token has not been told: the step that made it ended it, if there is one."""
        told = request in self._begun
        self._begun.discard(request)
        return not told and request.times.first_token is not None

    def _forget(self, step: StepRecord) -> None:
        """Drops those that are gone."""
        request_of = step.scheduler.request_of
        self._last = {i: time for i, time in self._last.items() if request_of(i) is not None}
        self._limit = _KEPT + 2 * len(self._last)


class Meter:
    """An observer that counts everything since the server began, whatever becomes of its engines.

    Only the engine's thread writes. Others read while it does: a number is never torn, and numbers that
    belong together may be one step apart.
    """

    def __init__(self) -> None:
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.sampled_tokens = 0
        self.busy_seconds = 0.0
        self.preemptions = 0
        self.cached_tokens = 0
        """Taken from the prefix cache by steps, those of preempted sequences included."""
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.step_seconds = Histogram(_STEP)
        self.step_tokens = Histogram(_STEP_TOKENS)
        self.budget_use = Histogram(_SHARE)
        self.token_gaps = Histogram(_PER_TOKEN)
        # Of requests with a first token.
        self.first_tokens = Histogram(_FIRST_TOKEN)
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        # Of requests that have ended.
        self.ended: Counter[str] = Counter(stop=0, length=0, abort=0, error=0)
        """Answers, by the reason."""
        # Of those of them that finished by themselves.
        self.whole = Histogram(_REQUEST)
        self.queue = Histogram(_REQUEST)
        self.inference = Histogram(_REQUEST)
        self.prefill = Histogram(_REQUEST)
        self.decode = Histogram(_REQUEST)
        self.per_token = Histogram(_PER_TOKEN)
        self.prompt_lengths = Histogram(_TOKENS)
        self.answer_lengths = Histogram(_TOKENS)
        self.longest_answers = Histogram(_TOKENS)
        self.request_preemptions = Histogram(_PREEMPTIONS)
        self.asked_answers = Histogram(_ANSWERS)
        self.asked_tokens = Histogram(_TOKENS)

        self._times = TokenTimes()
        self._scheduler: Scheduler | None = None  # the one of the last step
        self._prefix_counts = (0, 0)  # queries and hits of its engine

    def on_step(self, step: StepRecord) -> None:
        if step.scheduler is not self._scheduler:  # another engine, which counts from 0
            self._scheduler, self._prefix_counts = step.scheduler, (0, 0)
        output, capacity = step.output, step.capacity
        self.prefill_tokens += output.prefill_tokens
        self.decode_tokens += output.decode_tokens
        self.busy_seconds += step.seconds
        self.preemptions += len(output.preempted)
        self.cached_tokens += output.cached_tokens
        queries, hits = self._prefix_counts
        self.prefix_queries += capacity.prefix_queries - queries
        self.prefix_hits += capacity.prefix_hits - hits
        self._prefix_counts = capacity.prefix_queries, capacity.prefix_hits
        if (tokens := output.prefill_tokens + output.decode_tokens) > 0:
            self.step_seconds.add(step.seconds)
            self.step_tokens.add(tokens)
            self.budget_use.add(tokens / capacity.token_budget)
        self.sampled_tokens += int((output.finish != _ERROR).sum())
        begun, gaps = self._times.on_step(step)
        for request in begun:
            self._count_first(request)
        for seconds, count in gaps:
            self.token_gaps.add(seconds, count)

    def on_end(self, request: Request) -> None:
        if self._times.on_end(request):
            self._count_first(request)
        output = request.output
        if output is None:
            return
        reasons = [answer.finish_reason for answer in output.outputs]
        self.ended.update(reasons)
        if all(reason in ("stop", "length") for reason in reasons):
            self._count_finished(request, [len(answer.token_ids) for answer in output.outputs])

    def _count_first(self, request: Request) -> None:
        assert request.times.first_token is not None
        self.first_tokens.add(request.times.first_token - request.times.arrived)
        self.prompt_tokens += len(request.prompt_token_ids)
        self.prompt_tokens_cached += request.cached_tokens

    def _count_finished(self, request: Request, lengths: list[int]) -> None:
        times, params, longest = request.times, request.params, max(lengths)
        self.prompt_lengths.add(len(request.prompt_token_ids))
        for length in lengths:
            self.answer_lengths.add(length)
        self.longest_answers.add(longest)
        self.request_preemptions.add(request.preemptions)
        self.asked_answers.add(params.n)
        if params.max_tokens is not None:
            self.asked_tokens.add(params.max_tokens)
        if times.started is None or times.first_token is None or times.ended is None:
            return
        self.whole.add(times.ended - times.arrived)
        self.queue.add(times.started - times.arrived)
        self.inference.add(times.ended - times.started)
        self.prefill.add(times.first_token - times.started)
        self.decode.add(times.ended - times.first_token)
        if longest > 1:
            self.per_token.add((times.ended - times.first_token) / (longest - 1))
