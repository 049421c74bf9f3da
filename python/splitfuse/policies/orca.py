"""Iteration-level batching of whole prompts: Yu et al., Orca (OSDI 2022)."""

from __future__ import annotations

from .._core import Limits, SeqView, StepPlan
from ._room import Policy, Room
from .prefill_first import PROMPT_TOKENS


class Orca(Policy):
    """Every forward has one token of each sequence that decodes, and the whole prompts that wait. Nobody
    stands still, but a forward is as long as the prompts that happen to arrive."""

    whole_prompts = True

    def choose(self, views: list[SeqView], limits: Limits) -> StepPlan:
        room = Room(views, limits, self.step_tokens)
        room.serve_decodes()
        room.take_whole_prompts(PROMPT_TOKENS)
        return room.plan()
