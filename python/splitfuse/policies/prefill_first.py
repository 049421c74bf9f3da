"""Whole prompts first: what vLLM did up to version 0.2, and Hugging Face's text generation server."""

from __future__ import annotations

from .._core import Limits, SeqView, StepPlan
from ._room import Policy, Room

PROMPT_TOKENS = 4096
"""Of one forward of prompts; a longer prompt runs alone."""


class PrefillFirst(Policy):
    """While prompts wait, a forward is whole prompts and nothing else, and whoever decodes stands still; then
    all decode. Few forwards and full ones, but an answer stutters whenever somebody arrives."""

    whole_prompts = True

    def choose(self, views: list[SeqView], limits: Limits) -> StepPlan:
        room = Room(views, limits, self.step_tokens)
        room.take_whole_prompts(PROMPT_TOKENS)
        if not room.chunks:
            room.serve_decodes()
        return room.plan()
