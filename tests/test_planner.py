"""plan_splitfuse: held to a second, readable implementation, and to its promises in simulated service.

tests/cpp/planner_test.cc has the hand-made cases.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfuse._core import Limits, SeqView, plan_splitfuse

pytestmark = pytest.mark.machine_independent


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def to_do(seq: SeqView) -> int:
    return seq.known - seq.computed


def is_decode(seq: SeqView) -> bool:
    return to_do(seq) == 1 and seq.computed > 0


# ---- The rule again, in Python


class Rule:
    def __init__(self, order: list[SeqView], limits: Limits) -> None:
        self.order, self.limits = order, limits
        self.budget, self.slots, self.free = limits.max_tokens, limits.max_seqs, limits.free_blocks
        self.chunks: dict[int, int] = {}
        self.preempted: list[int] = []
        self.present = list(order)  # those who have not had to step aside

    def plan(self) -> tuple[list[tuple[int, int]], list[int]]:
        for wanted, serve in (
            (is_decode, self.serve_decode),
            (lambda seq: not is_decode(seq), self.serve_prompt),
        ):
            for seq in self.order:
                if seq in self.present and to_do(seq) > 0 and wanted(seq) and self.budget and self.slots:
                    serve(seq)
        return list(self.chunks.items()), self.preempted

    def serve_decode(self, seq: SeqView) -> None:
        self.make_room(seq, self.behind(seq))
        self.take(seq, 1) if self.room(seq) else self.step_aside(seq)

    def serve_prompt(self, seq: SeqView) -> None:
        victims = [other for other in self.behind(seq) if not is_decode(other)]
        while self.room(seq) < min(to_do(seq), self.budget) and victims and not to_do(victims[-1]):
            self.step_aside(victims.pop())
        if seq is self.order[0]:
            victims = [other for other in self.behind(seq) if is_decode(other)] + victims
        self.make_room(seq, victims)
        if tokens := min(to_do(seq), self.budget, self.room(seq)):
            self.take(seq, tokens)

    def make_room(self, seq: SeqView, victims: list[SeqView]) -> None:
        while not self.room(seq) and victims:
            self.step_aside(victims.pop())
        if not self.room(seq) and seq is self.order[0]:  # it is alone now
            self.free = self.limits.total_blocks - (seq.blocks - seq.behind)

    def behind(self, seq: SeqView) -> list[SeqView]:
        return self.present[self.present.index(seq) + 1 :]

    def room(self, seq: SeqView) -> int:
        """Tokens that fit into the blocks it holds and all free ones."""
        return max(0, (seq.blocks + self.free) * self.limits.block_size - seq.computed)

    def take(self, seq: SeqView, tokens: int, sign: int = 1) -> None:
        need = max(0, ceil_div(seq.computed + tokens, self.limits.block_size) - seq.blocks)
        self.free -= sign * need
        self.budget -= sign * tokens
        self.slots -= sign
        self.chunks[seq.id] = tokens

    def step_aside(self, seq: SeqView) -> None:
        self.present.remove(seq)
        if seq.id in self.chunks:
            self.take(seq, self.chunks[seq.id], sign=-1)
            del self.chunks[seq.id]
        if seq.blocks:
            self.preempted.append(seq.id)
            self.free += seq.own


# ---- Random pools

BLOCK_SIZE = 4


@dataclass
class Pool:
    """Views whose shared blocks are consistent: leading blocks may be those of an earlier sequence, or given back.
    `tables`: the blocks that each holds."""

    views: list[SeqView]
    limits: Limits
    tables: dict[int, list[int]] = field(default_factory=dict)


@st.composite
def pools(draw: st.DrawFn, sharing: bool = True) -> Pool:
    tables: dict[int, list[int]] = {}
    made = 0
    views = []
    for id in range(draw(st.integers(0, 8))):
        computed = draw(st.one_of(st.just(0), st.integers(1, 40)))
        table: list[int] = []
        if sharing and tables and draw(st.booleans()):
            other = tables[draw(st.sampled_from(sorted(tables)))]
            table = other[: draw(st.integers(0, min(len(other), computed // BLOCK_SIZE)))]
        while len(table) < ceil_div(computed, BLOCK_SIZE):
            table.append(made)
            made += 1
        tables[id] = table
        more = draw(st.sampled_from([0, 1, 1, 5, 60])) if computed else draw(st.sampled_from([1, 1, 7, 60]))
        views.append(SeqView(id, computed + more, computed, len(table), 0, 0))
    for view in views:
        if len(tables[view.id]) > 1 and draw(st.booleans()):
            view.behind = draw(st.integers(1, len(tables[view.id]) - 1))
            tables[view.id] = tables[view.id][view.behind :]
    for view in views:
        others = {block for id, table in tables.items() if id != view.id for block in table}
        view.shared = len(others.intersection(tables[view.id]))
    free = draw(st.integers(0, 12))
    held = len({block for table in tables.values() for block in table})
    limits = Limits(draw(st.integers(1, 70)), draw(st.integers(1, 9)), free, held + free, BLOCK_SIZE)
    return Pool(views, limits, tables)


@settings(max_examples=1500, deadline=None, database=None)
@given(pools())
def test_equals_the_second_implementation(pool: Pool) -> None:
    plan = plan_splitfuse(pool.views, pool.limits)
    assert (plan.chunks, plan.preempt) == Rule(pool.views, pool.limits).plan()
    assert plan == plan_splitfuse(pool.views, pool.limits)


@settings(max_examples=800, deadline=None, database=None)
@given(pools())
def test_no_chunk_without_blocks(pool: Pool) -> None:
    """With the real block tables, sharing included: what is left free by the victims is enough for all chunks."""
    plan = plan_splitfuse(pool.views, pool.limits)
    views = {view.id: view for view in pool.views}
    held = {block for id, table in pool.tables.items() if id not in plan.preempt for block in table}
    need = sum(
        ceil_div(views[id].computed + tokens, BLOCK_SIZE) - views[id].blocks for id, tokens in plan.chunks
    )
    assert need <= pool.limits.total_blocks - len(held)
    for id, tokens in plan.chunks:
        assert 1 <= tokens <= to_do(views[id])
        assert id not in plan.preempt
    assert len({id for id, _ in plan.chunks}) == len(plan.chunks) <= pool.limits.max_seqs
    assert sum(tokens for _, tokens in plan.chunks) <= pool.limits.max_tokens


@settings(max_examples=800, deadline=None, database=None)
@given(pools())
def test_decodes_come_first(pool: Pool) -> None:
    """No prompt token while a decode waits, but for the first in order, who may preempt it."""
    plan = plan_splitfuse(pool.views, pool.limits)
    views = {view.id: view for view in pool.views}
    kinds = [is_decode(views[id]) for id, _ in plan.chunks]
    assert kinds == sorted(kinds, reverse=True)
    served = {id for id, _ in plan.chunks}
    unserved = [view for view in pool.views if is_decode(view) and view.id not in served]
    if False in kinds:
        assert all(view.id in plan.preempt for view in unserved)


@settings(max_examples=1500, deadline=None, database=None)
@given(pools())
def test_the_budget_is_met_exactly_while_there_is_work_and_room(pool: Pool) -> None:
    """Room: nobody had to be preempted."""
    plan = plan_splitfuse(pool.views, pool.limits)
    chunks = dict(plan.chunks)
    tokens = sum(chunks.values())
    if plan.preempt or len(chunks) == pool.limits.max_seqs:
        return
    free = pool.limits.free_blocks
    for view in pool.views:
        free -= ceil_div(view.computed + chunks.get(view.id, 0), BLOCK_SIZE) - view.blocks
    for view in pool.views:
        computed = view.computed + chunks.get(view.id, 0)
        could_go_on = computed < view.known and (free > 0 or computed % BLOCK_SIZE)
        assert tokens == pool.limits.max_tokens or not could_go_on


@settings(max_examples=800, deadline=None, database=None)
@given(pools())
def test_the_first_in_order_always_advances(pool: Pool) -> None:
    if not pool.views or to_do(pool.views[0]) == 0:
        return
    first = pool.views[0]
    if (
        first.blocks - first.behind == pool.limits.total_blocks
        and first.computed == first.blocks * BLOCK_SIZE
    ):
        return  # it holds the whole pool: put() refuses what could come to this
    plan = plan_splitfuse(pool.views, pool.limits)
    decodes = sum(is_decode(views) for views in pool.views)
    if is_decode(first) or decodes < min(pool.limits.max_tokens, pool.limits.max_seqs):
        assert first.id in dict(plan.chunks)


# ---- Service


@dataclass
class Simulated:
    id: int
    prompt: int
    output: int
    known: int = 0
    computed: int = 0

    @property
    def blocks(self) -> int:
        return ceil_div(self.computed, BLOCK_SIZE)

    @property
    def finished(self) -> bool:
        return self.known == self.prompt + self.output


class Service:
    """An engine of block arithmetic alone."""

    def __init__(self, requests: list[tuple[int, int]], budget: int, seqs: int, blocks: int) -> None:
        self.seqs = [Simulated(id, prompt, output, prompt) for id, (prompt, output) in enumerate(requests)]
        self.budget, self.max_seqs, self.blocks = budget, seqs, blocks

    def step(self) -> dict[int, int]:
        live = [seq for seq in self.seqs if not seq.finished]
        views = [SeqView(seq.id, seq.known, seq.computed, seq.blocks) for seq in live]
        free = self.blocks - sum(seq.blocks for seq in live)
        plan = plan_splitfuse(views, Limits(self.budget, self.max_seqs, free, self.blocks, BLOCK_SIZE))
        for id in plan.preempt:
            self.seqs[id].computed = 0
        for id, tokens in plan.chunks:
            seq = self.seqs[id]
            seq.computed += tokens
            seq.known += seq.computed == seq.known
        assert sum(seq.blocks for seq in live) <= self.blocks
        return dict(plan.chunks)


@settings(max_examples=200, deadline=None, database=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12),
    budget=st.integers(1, 40),
    seqs=st.integers(1, 12),
    spare=st.integers(0, 10),
)
def test_everyone_ends_and_the_oldest_never_waits_for_younger_ones(
    requests: list[tuple[int, int]], budget: int, seqs: int, spare: int
) -> None:
    largest = max(ceil_div(prompt + output, BLOCK_SIZE) for prompt, output in requests)
    service = Service(requests, budget, seqs, largest + spare)
    # Alone, the oldest of those left needs at most this; the others cost it at most their decodes.
    most = 2 * sum(
        ceil_div(prompt, min(budget, BLOCK_SIZE)) + output + len(requests) for prompt, output in requests
    )
    waited = 0
    for _ in range(most):
        live = [seq for seq in service.seqs if not seq.finished]
        if not live:
            return
        decodes = sum(seq.known - seq.computed == 1 and seq.computed > 0 for seq in live)
        chunks = service.step()
        advanced = live[0].id in chunks
        assert advanced or decodes >= min(budget, seqs)
        waited = 0 if advanced else waited + 1
        assert waited <= max(output for _, output in requests)
    raise AssertionError("not all have ended")
