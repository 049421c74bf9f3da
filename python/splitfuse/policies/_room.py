"""What the policies share: how much a forward still has room for, and whose KV blocks it takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

from .._core import ConfigError, Limits, SeqView, StepPlan, plan_splitfuse
from ..scheduler import Scheduler

if TYPE_CHECKING:
    from .._core import Engine
    from ..tokenizer import Tokenizer


def is_decode(view: SeqView) -> bool:
    return view.known - view.computed == 1 and view.computed > 0


class Room:
    """A plan in the making. `order`: the sequences that may run, first served first: those of `views` that
    have tokens to compute and are of `members`, None: all. `tokens`: of the forward.

    Blocks are taken from the back alone, first from those that may not run, and never from one that runs: so
    who is first always gets what it needs.
    """

    def __init__(
        self, views: Sequence[SeqView], limits: Limits, tokens: int, members: Container[int] | None = None
    ) -> None:
        self.order: list[SeqView] = []
        others: list[SeqView] = []
        for view in views:
            may_run = view.known > view.computed and (members is None or view.id in members)
            (self.order if may_run else others).append(view)
        self.tokens = tokens
        self.slots = limits.max_seqs
        self.free = limits.free_blocks
        self.chunks: list[tuple[int, int]] = []
        self.preempted: list[int] = []
        self._line = self.order + others
        self._end = len(self._line)  # whoever is at or behind it has been preempted
        self._running: set[int] = set()
        self._total = limits.total_blocks
        self._block_size = limits.block_size

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
            if self._line[self._end - 1].id in self._running:
                return
            self._preempt_last()
        if index == 0 and self._end == 1:
            # Blocks that the victims shared among themselves are free now, which no single one of them told.
            self.free = self._total - (view.blocks - view.behind)
        if self._blocks(view, 1) > self.free:
            self._preempt_last()
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
        prompt may exceed. They preempt nobody who decodes, and leave blocks for the next token of all who do,
        or prompts and decodes would drive each other out in turns."""
        spare = sum(map(is_decode, self.order[: self._end]))
        taken = 0
        for index, view in enumerate(self.order):
            if index >= self._end:
                return
            if is_decode(view):
                continue
            todo = view.known - view.computed
            blocks = self._blocks(view, todo) + spare
            while blocks > self.free and self._end > index + 1 and self._last_waits():
                self._preempt_last()
            fits = todo <= self.tokens and self.slots > 0 and blocks <= self.free
            if not fits or (taken > 0 and taken + todo > limit):
                return
            taken += todo
            self.take(view, todo)

    def plan(self) -> StepPlan:
        return StepPlan(self.chunks, self.preempted)

    def _blocks(self, view: SeqView, tokens: int) -> int:
        return max(0, -(-(view.computed + tokens) // self._block_size) - view.blocks)

    def _last_waits(self) -> bool:
        last = self._line[self._end - 1]
        return not is_decode(last) and last.id not in self._running

    def _preempt_last(self) -> None:
        self._end -= 1
        view = self._line[self._end]
        if view.blocks > 0:
            self.preempted.append(view.id)
            self.free += view.own


class Policy(Scheduler):
    """A scheduler whose forwards are chosen in Python. Where a policy finds nothing that it may run although
    there is work, as when the blocks for a whole prompt are held by half-computed ones, SplitFuse decides."""

    whole_prompts = False
    """Whether forwards are as long as whole prompts, beyond the token budget."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, **options: Any) -> None:
        super().__init__(engine, tokenizer, **options)
        capacity = engine.query()
        self.step_tokens: int = capacity.max_step_tokens  # of the largest forward
        if self.whole_prompts and self.step_tokens < capacity.max_model_len:
            raise ConfigError(
                f"{type(self).__name__} needs forwards of up to {capacity.max_model_len} tokens, and this "
                f"engine takes {self.step_tokens}: build it with max_step_tokens of splitfuse.policies"
            )

    def plan(self, views: list[SeqView], limits: Limits) -> StepPlan:
        plan = self.choose(views, limits)
        return plan if plan.chunks else plan_splitfuse(views, limits)

    @abstractmethod
    def choose(self, views: list[SeqView], limits: Limits) -> StepPlan:
        """The plan, or one without chunks."""
