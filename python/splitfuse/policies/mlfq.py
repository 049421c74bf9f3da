"""Skip-join multi-level feedback queues on top of SplitFuse chunks: Wu et al., FastServe (2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._core import Limits, SeqView, StepPlan
from ._room import Policy, Room

if TYPE_CHECKING:
    from .._core import Engine
    from ..tokenizer import Tokenizer

_FIRST_QUANTUM = 64
"""Tokens of the first level; each further level has twice as many. FastServe counts time; here a forward's time
depends on its tokens, whosever they are, so tokens are the time."""
_STARVED = 256
"""Forwards without a token after which a sequence rises to the first level."""


@dataclass(slots=True)
class _Place:
    level: int
    used: int = 0  # tokens of this level's quantum
    served: int = 0  # the forward that last ran it


class Mlfq(Policy):
    """Short work first, without knowing how long answers will be. A sequence joins the first level whose
    quantum covers its prompt, and falls one level when it has used its quantum up; levels are served in order,
    prompts and decodes alike, until the token budget is met. So a short question overtakes a long document,
    and a long answer gives way to new questions."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, **options: Any) -> None:
        super().__init__(engine, tokenizer, **options)
        self._places: dict[int, _Place] = {}
        self._forwards = 0

    def choose(self, views: list[SeqView], limits: Limits) -> StepPlan:
        self._forwards += 1
        self._places = {view.id: self._place(view) for view in views}
        places = self._places
        # Stable: equals keep the order of their arrival.
        ordered = sorted(views, key=lambda view: (view.priority, places[view.id].level))
        room = Room(ordered, limits, limits.max_tokens)
        for index in range(len(room.order)):
            room.serve(index, room.tokens)
        for id, tokens in room.chunks:
            self._charge(places[id], tokens)
        return room.plan()

    def _place(self, view: SeqView) -> _Place:
        place, todo = self._places.get(view.id), view.known - view.computed
        if place is None:
            return _Place(_level(todo), served=self._forwards)
        if self._forwards - place.served > _STARVED:
            # What it has to compute before its next token is free: else its blocks could be taken before that,
            # and the rise would have been for nothing.
            return _Place(0, used=-todo, served=self._forwards)
        return place

    def _charge(self, place: _Place, tokens: int) -> None:
        place.served = self._forwards
        place.used += tokens
        while place.used > _quantum(place.level):
            place.used -= _quantum(place.level)
            place.level += 1


def _quantum(level: int) -> int:
    return _FIRST_QUANTUM << level


def _level(tokens: int) -> int:
    """The first whose quantum covers so many tokens."""
    return max(0, (tokens - 1).bit_length() - (_FIRST_QUANTUM.bit_length() - 1))
