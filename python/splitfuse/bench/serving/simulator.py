"""An engine without a model: the real planner and block arithmetic, and a clock that a cost model moves.

Policies and the scheduler run on it as they are, so what they would do to a machine's users can be told without
that machine.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from ..._core import InvalidArgument, Limits, SeqView, StepPlan, plan_splitfuse

_ALL = 1 << 40
_LENGTH = 2  # StepOutput.finish of an answer that has its length


class VirtualClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class CostModel(Protocol):
    def seconds(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Of a forward; `chunks`: (position of the first token, tokens)."""


class CurveCost:
    """Time by the tokens of a forward, between measured `points` (tokens, seconds) on straight lines, beyond the
    last on its slope; and `kv_seconds_per_token` for each cached token that attention reads."""

    def __init__(self, points: Sequence[tuple[int, float]], *, kv_seconds_per_token: float = 0.0) -> None:
        if len(points) < 2:
            raise InvalidArgument("a curve needs at least two points")
        self._tokens = [tokens for tokens, _ in points]
        self._seconds = [seconds for _, seconds in points]
        self._kv = kv_seconds_per_token

    def seconds(self, chunks: Sequence[tuple[int, int]]) -> float:
        total = sum(tokens for _, tokens in chunks)
        right = min(max(1, bisect.bisect_left(self._tokens, total)), len(self._tokens) - 1)
        (x0, x1), (y0, y1) = self._tokens[right - 1 : right + 1], self._seconds[right - 1 : right + 1]
        forward = y0 + (y1 - y0) * max(0, total - x0) / (x1 - x0)
        return forward + self._kv * sum(start for start, _ in chunks)


A100_70B = CurveCost(
    [
        (1, 0.022), (64, 0.025), (128, 0.030), (256, 0.036), (512, 0.068), (768, 0.094),
        (896, 0.122), (1024, 0.130), (1536, 0.187), (2048, 0.257),
    ],
)  # fmt: skip
"""Forwards of Llama-2-70B on four A100, read off the figures of the DeepSpeed-FastGen blog (2023)."""


@dataclass
class _Sequence:
    id: int
    known: int
    end: int  # known tokens at which the answer is complete
    priority: int
    arrival: int
    computed: int = 0
    blocks: int = 0
    finished: bool = False


@dataclass
class SimulatedEngine:
    """The verbs of `splitfuse.Engine`, without prefix cache, stop tokens or log-probabilities."""

    cost: CostModel
    clock: VirtualClock
    token_budget: int
    max_step_tokens: int
    max_sequences: int
    max_model_len: int
    blocks: int
    block_size: int = 32
    vocab_size: int = 1000
    free: int = field(init=False)

    def __post_init__(self) -> None:
        self.free = self.blocks
        self.model_config = SimpleNamespace(vocab_size=self.vocab_size)
        self.memory_plan = SimpleNamespace(
            max_step_tokens=max(self.max_step_tokens, self.token_budget), max_model_len=self.max_model_len
        )
        self._sequences: dict[int, _Sequence] = {}
        self._arrivals = 0

    def query(self, id: int | None = None) -> Any:
        if id is not None:
            return SimpleNamespace(cached=0)
        return SimpleNamespace(
            max_model_len=self.max_model_len,
            max_sequences=self.max_sequences,
            token_budget=self.token_budget,
            max_step_tokens=self.memory_plan.max_step_tokens,
            block_size=self.block_size,
            total_blocks=self.blocks,
            used_blocks=self.blocks - self.free,
        )

    def put(
        self, id: int, tokens: Sequence[int], params: Any, priority: int = 0, cache_salt: str = ""
    ) -> None:
        if id in self._sequences:
            raise InvalidArgument(f"sequence {id} is still being served")
        end = len(tokens) + params.max_tokens
        if end > self.max_model_len or -(-end // self.block_size) > self.blocks:
            raise InvalidArgument(f"{end} tokens exceed the context or the KV blocks")
        self._arrivals += 1
        self._sequences[id] = _Sequence(id, len(tokens), end, priority, self._arrivals)

    def flush(self, id: int) -> None:
        self.free += self._sequences.pop(id).blocks

    def has_work(self) -> bool:
        return any(not s.finished for s in self._sequences.values())

    def view(self) -> tuple[list[SeqView], Limits]:
        return self._views(_ALL), self._limits()

    def step(self, plan: StepPlan | None = None) -> Any:
        if plan is None:
            plan = plan_splitfuse(self._views(self.token_budget), self._limits())
        else:
            self._check(plan)
        for id in plan.preempt:
            self._drop(self._sequences[id])
        begin = self.clock.now
        chunks = [(self._sequences[id], tokens) for id, tokens in plan.chunks]
        if chunks:
            self.clock.advance(self.cost.seconds([(s.computed, tokens) for s, tokens in chunks]))
        return self._commit(chunks, list(plan.preempt), self.clock.now - begin)

    # ---------------------------------------------------------------- inside

    def _commit(self, chunks: Iterable[tuple[_Sequence, int]], preempted: list[int], seconds: float) -> Any:
        decodes = prefills = 0
        ids, finish, ran = [], [], []
        for s, tokens in chunks:
            if s.computed > 0 and s.known - s.computed == 1:
                decodes += 1
            else:
                prefills += tokens
            more = self._more_blocks(s, tokens)
            self.free -= more
            s.blocks += more
            s.computed += tokens
            ran.append((s.id, tokens))
            if s.computed == s.known:
                s.known += 1
                s.finished = s.known >= s.end
                ids.append(s.id)
                finish.append(_LENGTH if s.finished else 0)
        return SimpleNamespace(
            ids=np.array(ids, np.int64),
            tokens=np.ones(len(ids), np.int32),
            finish=np.array(finish, np.uint8),
            sampled=[],
            prompt=[],
            chunks=ran,
            preempted=preempted,
            decode_tokens=decodes,
            prefill_tokens=prefills,
            cached_tokens=0,
            host_us=0.0,
            forward_us=1e6 * seconds,
        )

    def _views(self, tokens: int) -> list[SeqView]:
        """As the engine lists them: all that hold blocks, and of the others as many as `tokens` and a forward's
        sequences allow."""
        slots = self.max_sequences
        views = []
        for s in sorted(self._sequences.values(), key=lambda s: (s.priority, s.arrival)):
            if s.finished or (s.blocks == 0 and (tokens <= 0 or slots <= 0)):
                continue
            tokens -= s.known - s.computed
            slots -= 1
            views.append(SeqView(s.id, s.known, s.computed, s.blocks, 0, s.priority))
        return views

    def _limits(self) -> Limits:
        return Limits(
            max_tokens=self.token_budget,
            max_seqs=self.max_sequences,
            free_blocks=self.free,
            total_blocks=self.blocks,
            block_size=self.block_size,
        )

    def _more_blocks(self, s: _Sequence, tokens: int) -> int:
        return max(0, -(-(s.computed + tokens) // self.block_size) - s.blocks)

    def _drop(self, s: _Sequence) -> None:
        self.free += s.blocks
        s.blocks = s.computed = 0

    def _check(self, plan: StepPlan) -> None:
        named = [id for id, _ in plan.chunks] + list(plan.preempt)
        if len(set(named)) < len(named) or any(id not in self._sequences for id in named):
            raise InvalidArgument("the plan cannot be served: it names a sequence twice, or an unknown one")
        if len(plan.chunks) > self.max_sequences:
            raise InvalidArgument("the plan cannot be served: too many sequences")
        if sum(tokens for _, tokens in plan.chunks) > self.memory_plan.max_step_tokens:
            raise InvalidArgument("the plan cannot be served: too many tokens")
        need = -sum(self._sequences[id].blocks for id in plan.preempt)
        for id, tokens in plan.chunks:
            s = self._sequences[id]
            if s.finished or not 1 <= tokens <= s.known - s.computed:
                raise InvalidArgument(f"the plan cannot be served: {tokens} tokens of sequence {id}")
            need += self._more_blocks(s, tokens)
        if need > self.free:
            raise InvalidArgument("the plan cannot be served: too few KV blocks")
