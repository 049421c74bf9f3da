"""Batches without continuous batching: what serving was before Orca."""

from __future__ import annotations

from .._core import Limits, SeqView, StepPlan
from ._room import Policy, Room
from .prefill_first import PROMPT_TOKENS


class StaticBatch(Policy):
    """A batch is formed of those that wait, its prompts are computed, and it decodes until its last member
    has ended; who comes later waits for the next batch. A member that ends early leaves its place empty."""

    whole_prompts = True
    _batch: frozenset[int] = frozenset()

    def choose(self, views: list[SeqView], limits: Limits) -> StepPlan:
        self._batch = frozenset(id for id in self._batch if self.request_of(id) is not None)
        if not self._batch:
            self._batch = self._form(views, limits)
        room = Room(views, limits, self.step_tokens, self._batch)
        room.take_whole_prompts(PROMPT_TOKENS)
        if not room.chunks:
            room.serve_decodes()
        return room.plan()

    def _form(self, views: list[SeqView], limits: Limits) -> frozenset[int]:
        """As many as can decode together to the end of their longest answers."""
        chosen: list[int] = []
        blocks = 0
        for view in views:
            blocks += -(-(view.known + self._answer_tokens(view)) // limits.block_size)
            if len(chosen) == limits.max_seqs or (chosen and blocks > limits.total_blocks):
                break
            chosen.append(view.id)
        return frozenset(chosen)

    def _answer_tokens(self, view: SeqView) -> int:
        request = self.request_of(view.id)
        if request is None or request.params.max_tokens is None:
            return 0
        return request.params.max_tokens
