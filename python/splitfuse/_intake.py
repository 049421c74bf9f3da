"""The requests that wait for admission to the engine. Guarded by its owner's lock."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from ._core import Error, InvalidArgument

if TYPE_CHECKING:
    from .request import Request

_FEW = 64  # entries of the heap below which it is left alone


class QueueFull(Error):
    """Refused: as many requests, or prompt tokens, wait as may. Try again later."""


class Intake:
    """A queue by (priority, arrival). `most`: requests that may wait, `most_tokens`: tokens of their prompts, None:
    any number. A prompt alone is taken however long it is."""

    def __init__(self, most: int | None, most_tokens: int | None = None) -> None:
        for name, value in (("max_queued", most), ("max_queued_tokens", most_tokens)):
            if value is not None and value < 0:
                raise InvalidArgument(f"{name} must be 0 or more, or None, not {value}")
        self.waiting = 0
        self.tokens = 0
        """Of the prompts that wait."""
        self._most = most
        self._most_tokens = most_tokens
        self._heap: list[tuple[int, int, Request]] = []  # those that were dropped leave it now and then

    def add(self, request: Request, arrival: int) -> None:
        if self._most is not None and self.waiting >= self._most:
            raise QueueFull(f"{self.waiting} requests wait already, as many as may (max_queued)")
        tokens = self.tokens + len(request.prompt_token_ids)
        if self._most_tokens is not None and self.waiting and tokens > self._most_tokens:
            raise QueueFull(
                f"{self.tokens} prompt tokens wait already; {self._most_tokens} may (max_queued_tokens)"
            )
        heapq.heappush(self._heap, (request.priority, arrival, request))
        self.waiting += 1
        self.tokens = tokens

    def first_priority(self) -> int | None:
        """Of whom `pop` would give; None if nobody waits."""
        while self._heap and not self._heap[0][2]._queued:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self) -> Request:
        """After `first_priority` has found somebody."""
        request = heapq.heappop(self._heap)[2]
        self.drop(request)
        return request

    def drop(self, request: Request) -> None:
        """Takes it out; does nothing if it waits no more."""
        if not request._queued:
            return
        request._queued = False
        self.waiting -= 1
        self.tokens -= len(request.prompt_token_ids)
        # Those behind others that never end would stay, prompts and all, until they surface.
        if len(self._heap) > max(_FEW, 2 * self.waiting):
            self._heap = [entry for entry in self._heap if entry[2]._queued]
            heapq.heapify(self._heap)

    def everyone(self) -> list[Request]:
        return [request for _, _, request in self._heap if request._queued]
