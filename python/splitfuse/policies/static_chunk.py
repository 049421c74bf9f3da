"""Chunked prefill with a fixed chunk: Agrawal et al., Sarathi (2023)."""

from __future__ import annotations

from .._core import Limits, SeqView, StepPlan
from ._room import Policy, Room, is_decode


class StaticChunk(Policy):
    """Every forward has one token of each sequence that decodes, and one chunk of a single prompt, as long as
    the token budget. Short prompts are not composed: a prompt's last chunk, or a short prompt, leaves the
    forward half empty."""

    whole_prompts = True  # a chunk comes on top of the decodes, so forwards exceed the budget

    def choose(self, views: list[SeqView], limits: Limits) -> StepPlan:
        room = Room(views, limits, self.step_tokens)
        room.serve_decodes()
        for index, view in enumerate(room.order):
            if not is_decode(view):
                room.serve(index, limits.max_tokens)
                break
        return room.plan()
