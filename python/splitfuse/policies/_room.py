"""What the policies share: how much a forward still has room for, and whose KV blocks it takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from .._core import Limits, SeqView, StepPlan, plan_splitfuse
from ..scheduler import Scheduler


def is_decode(view: SeqView) -> bool:
    return view.known - view.computed == 1 and view.computed > 0


class Room:
    """A plan in the making. `order`: the sequences that have tokens to compute, first served first; `tokens`:
    of the forward.

    Blocks are taken from sequences at the back of the order alone, and never from one that runs: so who is
    first always gets what it needs.
    """

    def __init__(self, views: Iterable[SeqView], limits: Limits, tokens: int) -> None:
        self.order = [view for view in views if view.known > view.computed]
        self.tokens = tokens
        self.slots = limits.max_seqs
        self.free = limits.free_blocks
        self.chunks: list[tuple[int, int]] = []
        self.preempted: list[int] = []
        self._running: set[int] = set()
        self._total = limits.total_blocks
        self._block_size = limits.block_size
        self._end = len(self.order)  # whoever is at or behind it has been preempted

    def fits(self, view: SeqView, tokens: int, spare: int = 0) -> bool:
        """Whether the forward and the free blocks have room for it, `spare` blocks left over."""
        return tokens <= self.tokens and self.slots > 0 and self._blocks(view, tokens) + spare <= self.free

    def take(self, view: SeqView, tokens: int) -> None:
        self.free -= self._blocks(view, tokens)
        self.tokens -= tokens
        self.slots -= 1
        self.chunks.append((view.id, tokens))
        self._running.add(view.id)

    def serve(self, index: int, tokens: int) -> None:
        """Gives `order[index]` at most `tokens`, preempting whom it must from the back, but nobody who runs
        already. It gets less if blocks are short; where not even one token fits it waits, and loses its own
        blocks to those before it unless somebody behind it runs."""
        if index >= self._end:
            return
        view = self.order[index]
        tokens = min(tokens, self.tokens, view.known - view.computed)
        if tokens < 1 or self.slots < 1:
            return
        while self._blocks(view, 1) > self.free and self._end > index + 1:
            if self.order[self._end - 1].id in self._running:
                return
            self._end -= 1
            self._preempt(self.order[self._end])
        if index == 0 and self._end == 1:
            # Blocks that the victims shared among themselves are free now, which no single one of them told.
            self.free = self._total - view.blocks
        if self._blocks(view, 1) > self.free:
            self._end = index
            self._preempt(view)
            return
        room = (view.blocks + self.free) * self._block_size - view.computed
        self.take(view, min(tokens, room))

    def serve_decodes(self) -> None:
        """One token for every sequence that has begun to answer."""
        for index, view in enumerate(self.order):
            if is_decode(view):
                self.serve(index, 1)

    def take_whole_prompts(self, limit: int) -> None:
        """Whole prompts in order, until one does not fit any more; `limit`: tokens of them all, which a first
        prompt may exceed. Blocks stay free for the next token of every sequence that decodes, or prompts and
        decodes would drive each other out in turns."""
        live = self.order[: self._end]
        spare = sum(map(is_decode, live))
        taken = 0
        for view in live:
            if is_decode(view):
                continue
            todo = view.known - view.computed
            if (taken > 0 and taken + todo > limit) or not self.fits(view, todo, spare):
                return
            taken += todo
            self.take(view, todo)

    def plan(self) -> StepPlan:
        return StepPlan(self.chunks, self.preempted)

    def _blocks(self, view: SeqView, tokens: int) -> int:
        return max(0, -(-(view.computed + tokens) // self._block_size) - view.blocks)

    def _preempt(self, view: SeqView) -> None:
        if view.blocks > 0:
            self.preempted.append(view.id)
            self.free += view.blocks - view.shared


class Policy(Scheduler):
    """A scheduler whose forwards are chosen in Python. Where a policy finds nothing that it may run although
    there is work, as when the blocks for a whole prompt are held by half-computed ones, SplitFuse decides."""

    whole_prompts = False
    """Whether forwards are as long as whole prompts, beyond the token budget."""

    def plan(self, views: list[SeqView], limits: Limits) -> StepPlan:
        plan = self.choose(views, limits)
        return plan if plan.chunks else plan_splitfuse(views, limits)

    @abstractmethod
    def choose(self, views: list[SeqView], limits: Limits) -> StepPlan:
        """The plan, or one without chunks."""

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest forward."""
        return self.engine.memory_plan.max_step_tokens
